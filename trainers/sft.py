"""Supervised fine-tuning: full, LoRA or QLoRA, one loop.

    L = -(1 / n) Σ_rows Σ_t m_t log p(token_t | tokens_<t)          n = Σ m over the whole window of one update

m is 1 on the answers and their end token, 0 on prompts and padding. The three methods differ only in what is trained:

    full    every weight; fp32 master weights, activations in `dtype`
    lora    A and B (fp32) beside a frozen dense base in `dtype`
    qlora   A and B (fp32) beside a frozen 4-bit base; what stays dense (embeddings, norms, head) in `dtype`

    qlora sft --model smollm2-135m --data rows.jsonl --method qlora --out runs/first
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.batch import Batch, collate, collate_packed
from data.dataset import Dataset, read_datasets
from data.encode import Encoded, EncodedDataset, encode_dataset
from data.formats import describe
from data.order import DataOrder
from lora import count_parameters, trainable_parameters
from lora.adapters import lora_layers
from models import Decoder, Tokenizer, load_tokenizer

from . import run_folder, world
from .logprobs import per_token_nll
from .loop import count_window, evaluate, split, train_step
from .metrics import ProgressLine
from .optimizers import make_optimizer
from .prepare import prepare_model
from .recipes import Recipe, warnings
from .results import LOSS_CURVES, answers, write_plots, write_samples, write_weights
from .run import Run, RunResult, Trained, finished
from .sft_config import SFTConfig

__all__ = ["RunResult", "SFTConfig", "Trained", "evaluate_loss", "prepare_model", "sft_loss", "train"]


def sft_loss(nll: Tensor, completion_mask: Tensor, num_items: int | None = None) -> Tensor:
    """Σ m · nll / num_items: a micro-batch's share of the window's loss, a scalar.

    nll: fp32 (B, T-1), of token t+1 at position t. completion_mask: (B, T). num_items: counted tokens of the whole
    window over all ranks; None means this batch's own. A batch without a counted token gives 0, not NaN.
    """
    mask = completion_mask[:, 1:]
    return (nll * mask).sum() / max(1, num_items if num_items is not None else int(mask.sum()))


def train(config: SFTConfig, *, quiet: bool = False) -> Trained:
    """Train and write the run's folder. Raises ValueError or OSError for what a user got wrong.

    With resume, a run that is finished already is not trained again: its model and its last numbers come back.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    out = Path(config.out)
    data, held_out = read_datasets(config)
    env = run_folder.environment(run_folder.rows_hash(data.rows))
    run_folder.check(out, config, env, resume=config.resume)

    tokenizer = load_tokenizer(config.model).with_chat_template(config.chat_template)
    train_set = _encode(config, tokenizer, data)
    order = _data_order(config, train_set)
    window = config.batch_size * config.accumulation * world.world_size()
    total_steps = config.max_steps or max(1, math.ceil(order.n_rows * config.epochs / window))
    if config.resume and (last_row := run_folder.last_row_if_finished(out, total_steps)):
        return finished(config, tokenizer, last_row, quiet=quiet)
    eval_set = _encode(config, tokenizer, held_out) if held_out else None
    model = prepare_model(config)
    parameters = trainable_parameters(model)
    optimizer = make_optimizer(config, parameters)
    recipe = _recipe(config, model, train_set, order, window, total_steps)
    warned = warnings(recipe)

    with Run(config, env, warned, parameters, optimizer, total_steps, quiet=quiet) as run:
        packed = f"an epoch: {order}, {recipe.padding:.1%} padding"
        run.introduce(
            model,
            f"data: {data.schema.explanation}; {train_set.report}",
            f"{describe(tokenizer)}; learnt: {config.learn}",
            f"{packed}; {recipe.examples_per_update:.3g} examples an update",
        )
        model.train()
        for step in run.steps_left():
            batches = _batches(train_set, order.step(window, step), config.batch_size, tokenizer.pad_id)
            counts, rate = count_window(batches), config.rate(step, total_steps)

            def loss_of(batch: Batch, num_items: int = counts.learnt_tokens) -> Tensor:
                nll = per_token_nll(model, batch.input_ids, batch.segment_ids, batch.completion_mask)
                return sft_loss(nll, batch.completion_mask, num_items)

            with run.speed.measured(counts.tokens):
                loss, grad_norm = train_step(
                    batches,
                    loss_of,
                    parameters,
                    optimizer,
                    learning_rate=rate,
                    max_grad_norm=config.max_grad_norm,
                    skips=run.skips,
                )
            row: dict[str, Any] = {"examples": counts.examples, "learnt_tokens": counts.learnt_tokens}
            row["padding"] = round(counts.padding, 4)
            if eval_set and run.evaluation_is_due(step):
                row["eval_loss"] = evaluate_loss(model, eval_set.examples, config.batch_size, tokenizer.pad_id)
                run.progress.say(
                    f"step {step + 1}: loss {row['eval_loss']:.4f} on {len(eval_set.examples)} held-out rows"
                )
            run.end_step(step, loss, grad_norm, rate, **row)
    result = run.result()
    if world.is_main():
        _write_results(config, model, tokenizer, held_out, run.progress)
    return Trained(model, tokenizer, result)


def _write_results(
    config: SFTConfig, model: Decoder, tokenizer: Tokenizer, held_out: Dataset | None, progress: ProgressLine
) -> None:
    write_weights(config, model, tokenizer, progress)
    write_plots(Path(config.out), {"loss": (LOSS_CURVES, "loss per learnt token (nats)")}, progress)
    if held_out is not None and config.samples and (samples := answers(model, tokenizer, held_out, config.samples)):
        write_samples(Path(config.out), samples)


def _data_order(config: SFTConfig, train_set: EncodedDataset) -> DataOrder:
    return DataOrder(
        [len(example.ids) for example in train_set.examples],
        config.seed,
        capacity=config.max_seq_length if config.packing else None,
        group=config.batch_size * world.world_size() if config.group_by_length else None,
    )


def _recipe(
    config: SFTConfig, model: Decoder, train_set: EncodedDataset, order: DataOrder, window: int, total_steps: int
) -> Recipe:
    report = train_set.report
    return Recipe(
        method=config.method,
        learning_rate=config.peak_rate,
        parameters=count_parameters(model)[1],
        r=config.r,
        scaling=config.lora().scaling(""),
        use_rslora=config.use_rslora,
        targets=frozenset(path.rpartition(".")[2] for path in lora_layers(model)),
        rows=report.rows,
        truncated=report.truncated,
        dropped=report.dropped,
        examples=len(train_set.examples),
        longest=report.longest,
        context=model.config.max_position_embeddings,
        steps=total_steps,
        warmup_ratio=config.warmup_ratio,
        warmup_steps=config.warmup_steps(total_steps),
        examples_per_update=window * len(train_set.examples) / order.n_rows,
        padding=order.padding(config.batch_size),
        packing=config.packing,
    )


def _batches(train_set: EncodedDataset, rows: list[list[int]], batch_size: int, pad_id: int) -> list[Batch]:
    """This rank's micro-batches of an update over `rows` of example numbers."""
    examples = [[train_set.examples[i] for i in row] for row in world.my_rows(rows)]
    return [collate_packed(part, pad_id=pad_id) for part in split(examples, batch_size)]


def evaluate_loss(model: Decoder, examples: list[Encoded], batch_size: int, pad_id: int) -> float:
    """Mean loss per learnt token over the examples, in nats."""

    def nll_of(batch: Batch) -> tuple[Tensor, int]:
        nll = per_token_nll(model, batch.input_ids, batch.segment_ids, batch.completion_mask)
        return nll.sum(), int(batch.completion_mask[:, 1:].sum())

    return evaluate(model, [collate(part, pad_id=pad_id) for part in split(examples, batch_size)], nll_of)


def _encode(config: SFTConfig, tokenizer: Tokenizer, data: Dataset) -> EncodedDataset:
    length = config.max_seq_length
    return encode_dataset(tokenizer, data.rows, data.schema, max_seq_length=length, path=data.path, learn=config.learn)
