"""What DPO and ORPO share: pairs as batches, both answers' log-probabilities in one forward, what is logged of them.

B pairs in a micro-batch: 2B rows, those with the chosen answers first; T tokens of the longest row
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from data.batch import Batch, collate
from data.dataset import Dataset
from data.encode import encode_prompt
from data.order import DataOrder
from data.preference import EncodedPair, EncodedPairs, encode_pairs, to_pair
from lora import count_parameters, disabled_adapters
from lora.adapters import lora_layers
from lora.init import takes_from_weight
from models import Decoder, Tokenizer, generate

from . import world
from .flags import TrainerFlags
from .logprobs import sequence_logps, unpadded_logps
from .loop import split
from .metrics import ProgressLine
from .pair_flags import PairFlags
from .prepare import frozen_base
from .recipes import Recipe
from .results import write_plots, write_samples, write_weights


class PairBatch(NamedTuple):
    """A micro-batch: B pairs in 2B rows, and the pairs' numbers in their dataset."""

    rows: Batch
    numbers: list[int]


class PairCounts(NamedTuple):
    """What the micro-batches of a window hold."""

    pairs: int
    tokens: int
    learnt_tokens: int
    """of both answers"""


class AnswerLogps(NamedTuple):
    """Of each answer: the sum over its tokens of their log-probability, and their number; (2B,), chosen ones first."""

    sums: Tensor
    lengths: Tensor

    @property
    def means(self) -> Tensor:
        """An answer without a token has 0."""
        return self.sums / self.lengths.clamp(min=1)


def encode(flags: PairFlags, tokenizer: Tokenizer, data: Dataset) -> EncodedPairs:
    """The pairs of a data set as ids."""
    return encode_pairs(tokenizer, data.rows, data.schema, max_seq_length=flags.max_seq_length, path=data.path)


def pair_batches(pairs: Sequence[EncodedPair], numbers: Sequence[int], size: int, pad_id: int) -> list[PairBatch]:
    """The pairs of these numbers, `size` at a time."""
    batches = []
    for part in split(numbers, size):
        chosen, rejected = ([getattr(pairs[i], side) for i in part] for side in ("chosen", "rejected"))
        batches.append(PairBatch(collate([*chosen, *rejected], pad_id=pad_id), list(part)))
    return batches


def my_batches(pairs: Sequence[EncodedPair], rows: Sequence[list[int]], size: int, pad_id: int) -> list[PairBatch]:
    """This rank's micro-batches of an update; rows of one pair's number each, as DataOrder gives them."""
    return pair_batches(pairs, [number for (number,) in world.my_rows(rows)], size, pad_id)


def count_pairs(batches: Sequence[PairBatch]) -> PairCounts:
    """Of these batches alone; `over_world` adds the other ranks'."""
    return PairCounts(
        pairs=sum(len(batch.numbers) for batch in batches),
        tokens=sum(int((batch.rows.segment_ids > 0).sum()) for batch in batches),
        learnt_tokens=sum(int(batch.rows.completion_mask[:, 1:].sum()) for batch in batches),
    )


def over_world(counts: PairCounts) -> PairCounts:
    return PairCounts(*(int(world.sum_over_world(count)) for count in counts))


def answer_logps(model: Decoder, rows: Batch) -> AnswerLogps:
    """One forward over all rows, chosen and rejected."""
    logps = unpadded_logps(model, rows.input_ids, rows.segment_ids, rows.completion_mask)
    mask = rows.completion_mask[:, 1:]
    return AnswerLogps(sequence_logps(logps, mask), mask.sum(dim=1))


def scores_of(
    chosen_rewards: Tensor, rejected_rewards: Tensor, chosen_logps: Tensor, rejected_logps: Tensor
) -> dict[str, Tensor]:
    """What is logged of each pair, under TRL's names; all (B,)."""
    return {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
    }


class Totals:
    """Sums over pairs, by name, on their way to a mean over a window."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}

    def add(self, scores: Mapping[str, Tensor]) -> None:
        for name, values in scores.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(values.detach().sum())

    def means(self, pairs: int, *, everywhere: bool = False) -> dict[str, float]:
        """Divided by `pairs`; with everywhere, the sums of all ranks."""
        total = world.sum_over_world if everywhere else float
        return {name: total(value) / pairs for name, value in self.sums.items()}


class ShareOfLoss(Protocol):
    """A micro-batch's share of the loss of its window; adds its pairs' scores to totals."""

    def __call__(self, batch: PairBatch, *, totals: Totals) -> Tensor: ...


@torch.no_grad()
def evaluate_pairs(model: Decoder, batches: Sequence[PairBatch], share_of: ShareOfLoss) -> dict[str, float]:
    """eval_loss and the means of all scores over held-out pairs, as of one window; in eval mode meanwhile."""
    was_training, totals, loss = model.training, Totals(), 0.0
    model.eval()
    try:
        for batch in batches:
            loss += float(share_of(batch, totals=totals))
    finally:
        model.train(was_training)
    means = totals.means(sum(len(batch.numbers) for batch in batches))
    return {f"eval_{name}": value for name, value in ({"loss": loss} | means).items()}


def said_of(means: Mapping[str, float]) -> str:
    """A line about an evaluation."""
    return "loss {eval_loss:.4f}, accuracy {eval_rewards/accuracies:.0%}, margin {eval_rewards/margins:.3f}".format(
        **means
    )


@contextmanager
def untrained(flags: TrainerFlags, model: Decoder) -> Iterator[Decoder]:
    """The model as it was before training: its adapter switched off, or loaded again where that is another model."""
    if flags.method == "full" or takes_from_weight(flags.init):
        yield frozen_base(flags)
        return
    with disabled_adapters(model):
        yield model


def before_and_after(flags: PairFlags, model: Decoder, tokenizer: Tokenizer, held_out: Dataset) -> list[dict[str, Any]]:
    """Greedy answers to the first held-out prompts, before training and now, beside the two of the pair."""
    rows, room = held_out.rows[: flags.samples], model.config.max_position_embeddings - flags.max_new_tokens
    pairs = [to_pair(row, held_out.schema, f"{held_out.path}: row {i}") for i, row in enumerate(rows, start=1)]
    pairs = [pair for pair in pairs if len(encode_prompt(tokenizer, pair.prompt)) <= room]
    prompts = [encode_prompt(tokenizer, pair.prompt) for pair in pairs]

    def answers(of: Decoder) -> list[str]:
        completions = generate(of, prompts, max_new_tokens=flags.max_new_tokens, stop_ids=tokenizer.eos_ids)
        return [tokenizer.decode(completion.ids, skip_special_tokens=True) for completion in completions]

    with untrained(flags, model) as base:
        before = answers(base)
    return [
        {"prompt": pair.prompt, "before": old, "completion": new, "chosen": pair.chosen, "rejected": pair.rejected}
        for pair, old, new in zip(pairs, before, answers(model), strict=True)
    ]


def pair_recipe(
    flags: TrainerFlags, model: Decoder, dataset: EncodedPairs, order: DataOrder, window: int, total_steps: int
) -> Recipe:
    report = dataset.report
    return Recipe(
        trainer=flags.TRAINER,
        method=flags.method,
        learning_rate=flags.peak_rate,
        parameters=count_parameters(model)[1],
        r=flags.r,
        scaling=flags.lora().scaling(""),
        use_rslora=flags.use_rslora,
        targets=frozenset(path.rpartition(".")[2] for path in lora_layers(model)),
        rows=report.rows,
        truncated=report.truncated,
        dropped=report.dropped,
        examples=report.pairs,
        longest=report.longest,
        context=model.config.max_position_embeddings,
        steps=total_steps,
        warmup_ratio=flags.warmup_ratio,
        warmup_steps=flags.warmup_steps(total_steps),
        examples_per_update=window * report.pairs / order.n_rows,
        padding=0.0,
        packing=False,
    )


def write_pair_results(
    flags: PairFlags, model: Decoder, tokenizer: Tokenizer, held_out: Dataset | None, progress: ProgressLine
) -> None:
    """What a finished run leaves: weights, curves of loss, margin and accuracy, answers before and after."""
    if not world.is_main():
        return
    write_weights(flags, model, tokenizer, progress)
    write_plots(Path(flags.out), PAIR_PLOTS, progress)
    if held_out is not None and flags.samples:
        write_samples(Path(flags.out), before_and_after(flags, model, tokenizer, held_out))


PAIR_PLOTS: dict[str, tuple[dict[str, str], str]] = {
    "loss": ({"loss": "training", "eval_loss": "held out"}, "loss"),
    "margin": (
        {"rewards/margins": "margin", "rewards/chosen": "chosen", "rewards/rejected": "rejected",
         "eval_rewards/margins": "margin, held out"},
        "reward",
    ),
    "accuracy": (
        {"rewards/accuracies": "training", "eval_rewards/accuracies": "held out"},
        "share of pairs in the right order",
    ),
}  # fmt: skip
