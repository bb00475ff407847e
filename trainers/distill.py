"""Distillation: a student learns, at every learnt token, the distribution that its teacher has there.

    L = (1 / n) Σ_rows Σ_t m_t [ (1 - w) · D(T_t, S_t) + w · nll_t ]         n = Σ m over the whole window of an update

    T_t, S_t     softmax(logits / τ) of teacher and student after the same tokens
    D            generalised Jensen-Shannon divergence; β = 0: KL(T ‖ S), β = 1: KL(S ‖ T)   (kernels/divergence.py)
    nll          -log S of the dataset's token, at τ = 1; w is --ce-weight
    m            1 on the answers and their end token, as in sft.py

A dataset tells of each place which one token came; a teacher tells how likely every token was. On-policy rows have an
answer that the student sampled itself (on_policy.py): for those w = 0, since its own tokens are no truth to it.

    qlora shrink smollm2-135m runs/half --layers 15
    qlora distill --teacher smollm2-135m --model runs/half --method full --data rows.jsonl --out runs/student

The teacher is in memory (teacher.py), or its likeliest tokens are in files (teacher_cache.py). Hinton's factor τ²
(arXiv 1503.02531, §2) is left out, as GKD and TRL do: the gradient of D shrinks as about 1/τ².
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.batch import Batch, collate, collate_packed
from data.dataset import Dataset, read_datasets
from data.encode import Encoded
from data.formats import describe
from kernels import TopK, linear_distill
from kernels.divergence import check_mix, divergence, student_outcomes, teacher_outcomes
from kernels.linear_distill import Distilled
from lora import trainable_parameters
from models import Decoder, Tokenizer, load_tokenizer

from . import run_folder, world
from .distill_config import DistillConfig
from .distill_setup import about_the_teacher, check_prompts, distill_warnings, prepare_teacher, unhealthy
from .loop import count_window, split, train_step
from .metrics import ProgressLine
from .on_policy import sample_answers, sampled_rows
from .optimizers import make_optimizer
from .prepare import prepare_model
from .recipes import warnings
from .results import LOSS_CURVES, answers, write_plots, write_samples, write_weights
from .run import Run, Trained, finished
from .sft import data_order, encode, recipe_of
from .teacher import Split, Teacher, learnt


def distill_loss(
    student_logits: Tensor, teacher_logits: Tensor | TopK, *, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """D of each row, fp32 (M,): β 0 is KL(T ‖ S), 1 is KL(S ‖ T), between them generalised Jensen-Shannon.

    student_logits (M, V), differentiable. teacher_logits (M, V), or the teacher's TopK at this temperature (an
    (ids, logps) pair will do). A logit may be -inf: such a token has no probability.
    Raises ValueError for shapes that do not fit, beta outside [0, 1] and a temperature that is not positive.
    """
    check_mix(beta, temperature)
    s = _log_softmax(student_logits, temperature)
    if isinstance(teacher_logits, Tensor):
        if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
            shapes = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
            raise ValueError(f"distill_loss needs student and teacher logits of one shape (M, V), got {shapes}")
        return divergence(s, _log_softmax(teacher_logits.detach(), temperature), beta)
    ids, logps = teacher_logits
    if ids.ndim != 2 or ids.shape != logps.shape or len(ids) != len(s):
        shapes = f"{tuple(ids.shape)} and {tuple(logps.shape)}"
        raise ValueError(f"distill_loss needs the teacher's ids and logps ({len(s)}, k), got {shapes}")
    t = teacher_outcomes(_finite(logps.to(s.dtype)), s.shape[1])
    return divergence(student_outcomes(s, ids.long()), t, beta)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return _finite(torch.log_softmax(logits.to(wide) / temperature, dim=1))


def _finite(logps: Tensor) -> Tensor:
    """-inf → a number whose exp is 0: 0 · (-inf) is no number."""
    return logps.clamp(min=torch.finfo(logps.dtype).min / 4)


class MicroBatch(NamedTuple):
    """Part of an update's rows."""

    batch: Batch
    numbers: list[int]
    """of the examples in it, one after the other"""
    sampled: Tensor
    """bool (B,): rows whose answer the student sampled"""


def train(config: DistillConfig, *, quiet: bool = False) -> Trained:
    """Train and write the run's folder. Raises ValueError or OSError for what a user got wrong.

    With resume, a run that is finished already is not trained again: its model and its last numbers come back.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    out = Path(config.out)
    data, held_out = read_datasets(config)
    env = run_folder.environment(run_folder.rows_hash(data.rows))
    run_folder.check(out, asdict(config), env, resume=config.resume)

    tokenizer = load_tokenizer(config.model).with_chat_template(config.chat_template)
    train_set = encode(config, tokenizer, data)
    order = data_order(config, train_set)
    window = config.batch_size * config.accumulation * world.world_size()
    total_steps = config.max_steps or max(1, math.ceil(order.n_rows * config.epochs / window))
    if config.resume and (last_row := run_folder.last_row_if_finished(out, total_steps)):
        return finished(config, tokenizer, last_row, quiet=quiet)
    eval_set = encode(config, tokenizer, held_out) if held_out else None
    examples: dict[Split, list[Encoded]] = {"train": train_set.examples}
    if eval_set:
        examples["eval"] = eval_set.examples
    teacher = prepare_teacher(config, tokenizer, examples, quiet=quiet)
    model = prepare_model(config)
    check_prompts(config, data, train_set.examples, model.config.max_position_embeddings)
    parameters = trainable_parameters(model)
    optimizer = make_optimizer(config, parameters)
    recipe = recipe_of(config, model, train_set, order, window, total_steps)
    warned = [*warnings(recipe), *distill_warnings(config, model, teacher, recipe.longest)]

    with Run(config, env, warned, parameters, optimizer, total_steps, quiet=quiet) as run:
        run.introduce(
            model,
            about_the_teacher(config),
            f"data: {data.schema.explanation}; {train_set.report}",
            f"{describe(tokenizer)}; learnt: {config.learn}",
            f"an epoch: {order}, {recipe.padding:.1%} padding; {recipe.examples_per_update:.3g} examples an update",
        )
        last_kl, said = None, set[str]()
        if eval_set and not run.done:
            start = evaluate(model, teacher, eval_set.examples, config.batch_size, tokenizer.pad_id)
            last_kl = start["eval_kl"]
            run.progress.say(held_out_line("before", start, len(eval_set.examples)))
        model.train()
        for step in run.steps_left():
            rate, sums = config.rate(step, total_steps), Sums()
            with run.speed.measured(0):
                micro_batches = batches(config, model, tokenizer, train_set.examples, order.step(window, step), step)
            counts = count_window([micro.batch for micro in micro_batches])

            def loss_of(micro: MicroBatch, num_items: int = counts.learnt_tokens, sums: Sums = sums) -> Tensor:
                w = torch.where(micro.sampled, 0.0, config.ce_weight)
                found = compare(model, teacher, "train", micro.batch, micro.numbers, config.beta, config.temperature, w)
                sums.add(found, micro)
                return found.loss.sum() / max(1, num_items)

            with run.speed.measured(counts.tokens):
                loss, grad_norm = train_step(
                    micro_batches,
                    loss_of,
                    parameters,
                    optimizer,
                    learning_rate=rate,
                    max_grad_norm=config.max_grad_norm,
                    skips=run.skips,
                )
            row: dict[str, Any] = {"examples": counts.examples, "learnt_tokens": counts.learnt_tokens}
            row |= {"padding": round(counts.padding, 4)} | sums.means(config.on_policy_fraction > 0)
            if eval_set and run.evaluation_is_due(step):
                row |= evaluate(model, teacher, eval_set.examples, config.batch_size, tokenizer.pad_id)
                run.progress.say(held_out_line(f"step {step + 1}", row, len(eval_set.examples)))
            for line in unhealthy(config, row, last_kl):
                if line not in said:
                    run.progress.say(f"warning: {line}")
                said.add(line)
            last_kl = row.get("eval_kl", last_kl)
            run.end_step(step, loss, grad_norm, rate, **row)
    result = run.result()
    if world.is_main():
        _write_results(config, model, tokenizer, held_out, run.progress)
    return Trained(model, tokenizer, result)


def compare(
    model: Decoder,
    teacher: Teacher,
    split: Split,
    batch: Batch,
    numbers: Sequence[int],
    beta: float,
    temperature: float,
    ce_weight: Tensor | None = None,
) -> Distilled:
    """Student beside teacher at the batch's learnt tokens, (M,) each. ce_weight: of each row (B,), 0 by default."""
    hidden = model(batch.input_ids, segment_ids=batch.segment_ids, return_hidden=True)[:, :-1]
    where = learnt(batch)
    predictions, head = teacher.predictions(split, batch, numbers)
    return linear_distill(
        hidden[where],
        model.head(),
        predictions,
        head,
        targets=batch.input_ids[:, 1:][where],
        beta=beta,
        temperature=temperature,
        ce_weight=0.0 if ce_weight is None else ce_weight[:, None].expand(where.shape)[where],
    )


@torch.no_grad()
def evaluate(
    model: Decoder, teacher: Teacher, examples: Sequence[Encoded], batch_size: int, pad_id: int
) -> dict[str, float]:
    """eval_loss: cross-entropy per learnt token; eval_kl: KL(T ‖ S) at temperature 1. In nats, in eval mode."""
    was_training = model.training
    model.eval()
    nll = kl = 0.0
    try:
        for numbers in split(range(len(examples)), batch_size):
            batch = collate([examples[i] for i in numbers], pad_id=pad_id)
            found = compare(model, teacher, "eval", batch, numbers, 0.0, 1.0)
            nll, kl = nll + float(found.nll.sum()), kl + float(found.divergence.sum())
    finally:
        model.train(was_training)
    n = sum(example.n_learnt for example in examples)
    return {"eval_loss": nll / n, "eval_kl": kl / n}


def held_out_line(when: str, row: dict[str, Any], n: int) -> str:
    """What an evaluation found, in words."""
    return f"{when}: loss {row['eval_loss']:.4f}, KL to the teacher {row['eval_kl']:.4f} on {n} held-out rows"


def batches(
    config: DistillConfig,
    model: Decoder,
    tokenizer: Tokenizer,
    examples: Sequence[Encoded],
    rows: Sequence[list[int]],
    step: int,
) -> list[MicroBatch]:
    """This rank's micro-batches of update `step`, whose rows hold these examples; some are answered by the model."""
    coins = sampled_rows(config.seed, step, len(rows), config.on_policy_fraction)
    mine, sampled = world.my_rows(rows), list(world.my_rows(coins))
    texts = [[examples[i] for i in row] for row in mine]
    own = [i for i, coin in enumerate(sampled) if coin]
    if own:
        found = sample_answers(
            model,
            [texts[i][0] for i in own],
            seed=config.seed,
            step=step,
            max_new_tokens=config.max_new_tokens,
            temperature=config.sampling_temperature,
            stop_ids=tokenizer.eos_ids,
        )
        for i, example in zip(own, found, strict=True):
            texts[i] = [example]
    return [
        MicroBatch(
            collate_packed([texts[i] for i in part], pad_id=tokenizer.pad_id),
            [number for i in part for number in mine[i]],
            torch.tensor([sampled[i] for i in part]),
        )
        for part in split(range(len(mine)), config.batch_size)
    ]


class Sums:
    """Σ over the learnt tokens of an update, on this rank; `means` is over all ranks."""

    def __init__(self) -> None:
        self.divergence = self.nll = self.tokens = self.from_data = self.sampled_tokens = self.answers = 0.0

    def add(self, found: Distilled, micro: MicroBatch) -> None:
        where = learnt(micro.batch)
        own = micro.sampled[:, None].expand(where.shape)[where].to(found.nll.device)
        self.divergence += float(found.divergence.sum())
        self.nll += float(found.nll.detach()[~own].sum())
        self.tokens += len(own)
        self.from_data += float((~own).sum())
        self.sampled_tokens += float(own.sum())
        self.answers += float(micro.sampled.sum())

    def means(self, on_policy: bool) -> dict[str, float]:
        """For metrics.jsonl: divergence, nll (of the dataset's tokens), and what the student sampled."""
        names = ("divergence", "nll", "tokens", "from_data", "sampled_tokens", "answers")
        total = {name: world.sum_over_world(getattr(self, name)) for name in names}
        row = {"divergence": total["divergence"] / max(1.0, total["tokens"])}
        if total["from_data"]:
            row["nll"] = total["nll"] / total["from_data"]
        if on_policy:
            row["sampled_rows"] = total["answers"]
        if total["answers"]:
            row["sampled_length"] = total["sampled_tokens"] / total["answers"]
        return row


def _write_results(
    config: DistillConfig, model: Decoder, tokenizer: Tokenizer, held_out: Dataset | None, progress: ProgressLine
) -> None:
    write_weights(config, model, tokenizer, progress)
    plots = {
        "loss": (LOSS_CURVES | {"nll": "training, cross-entropy"}, "loss per learnt token (nats)"),
        "divergence": ({"divergence": "training", "eval_kl": "held out, KL(T ‖ S)"}, "divergence per token (nats)"),
    }
    if config.on_policy_fraction:
        plots["length"] = ({"sampled_length": "sampled answers"}, "tokens")
    write_plots(Path(config.out), plots, progress)
    if held_out is not None and config.samples and (samples := answers(model, tokenizer, held_out, config.samples)):
        write_samples(Path(config.out), samples)
