"""Supervised fine-tuning: full, LoRA or QLoRA, one loop.

    L = -(1 / n) Σ_rows Σ_t m_t log p(token_t | tokens_<t)          n = Σ m over the whole window of one update

m is 1 on the answers and their end token, 0 on prompts and padding. The three methods differ only in what is trained:

    full    every weight; fp32 master weights, activations in `dtype`
    lora    A and B (fp32) beside a frozen dense base in `dtype`
    qlora   A and B (fp32) beside a frozen 4-bit base; what stays dense (embeddings, norms, head) in `dtype`

    qlora sft --model smollm2-135m --data rows.jsonl --method qlora --out runs/first
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.batch import Batch, collate, collate_packed
from data.dataset import Dataset, read_datasets
from data.encode import Encoded, EncodedDataset, encode_dataset
from data.formats import describe
from data.order import DataOrder
from data.schema import Schema, detect
from data.sources import read_rows
from lora import LinearNF4, add_adapter, count_parameters, load_adapter, trainable_parameters
from lora.adapters import lora_layers
from models import Decoder, Tokenizer, load_model, load_tokenizer
from optim import learning_rate

from . import run_folder, world
from .checkpoint import all_checkpoints, load_checkpoint, save_checkpoint
from .logprobs import per_token_nll
from .loop import count_window, evaluate, split, train_step
from .metrics import MetricsFile, ProgressLine, Speed, peak_memory_bytes
from .optimizers import make_optimizer, paging
from .recipes import Recipe, warnings
from .results import write_results
from .safety import Skips, StopSignals
from .sft_config import SFTConfig


def sft_loss(nll: Tensor, completion_mask: Tensor, num_items: int | None = None) -> Tensor:
    """Σ m · nll / num_items: a micro-batch's share of the window's loss, a scalar.

    nll: fp32 (B, T-1), of token t+1 at position t. completion_mask: (B, T). num_items: counted tokens of the whole
    window over all ranks; None means this batch's own. A batch without a counted token gives 0, not NaN.
    """
    mask = completion_mask[:, 1:]
    return (nll * mask).sum() / max(1, num_items if num_items is not None else int(mask.sum()))


@dataclass(frozen=True)
class RunResult:
    """What a run ended with."""

    out: str
    steps: int
    loss: float
    """Of the last step's window."""
    eval_loss: float | None
    seconds: float
    """In optimizer steps, over all sessions of the run."""
    tokens_per_second: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Trained:
    """A finished run: the model as it is in memory, and how it went."""

    model: Decoder
    tokenizer: Tokenizer
    result: RunResult


def train(config: SFTConfig, *, quiet: bool = False) -> Trained:
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
    train_set = _encode(config, tokenizer, data)
    order = _data_order(config, train_set)
    window = config.batch_size * config.accumulation * world.world_size()
    total_steps = config.max_steps or max(1, math.ceil(order.n_rows * config.epochs / window))
    if config.resume and (last_row := run_folder.last_row_if_finished(out, total_steps)):
        return _finished(config, tokenizer, last_row, quiet=quiet)
    eval_set = _encode(config, tokenizer, held_out) if held_out else None
    model = prepare_model(config)
    parameters = trainable_parameters(model)
    optimizer = make_optimizer(config, parameters)

    recipe = _recipe(config, model, train_set, order, window, total_steps)
    warned = warnings(recipe)
    if not config.resume:
        run_folder.create(out, asdict(config), env, warned)
    done, speed, skips = 0, Speed(), Skips(config.max_skipped)
    if config.resume and (found := all_checkpoints(out / "checkpoints")):
        done, counters = load_checkpoint(found[-1], parameters, optimizer)
        speed = Speed(counters["seconds"], counters["tokens"])
        skips = Skips(config.max_skipped, counters["skipped"], counters["skipped_in_a_row"])
    metrics = MetricsFile(out / "metrics.jsonl", resume_after=done if config.resume else None, write=world.is_main())
    progress = ProgressLine(total_steps, done, quiet=quiet or not world.is_main())
    trainable, total = count_parameters(model)
    progress.say(f"{config.model}, {config.method}: {trainable:,} of {total:,} parameters train, seed {config.seed}")
    progress.say(f"data: {data.schema.explanation}; {train_set.report}")
    progress.say(f"{describe(tokenizer)}; learnt: {config.learn}")
    progress.say(
        f"an epoch: {order}, {recipe.padding:.1%} padding; {recipe.examples_per_update:.3g} examples an update"
    )
    for line in warned:
        progress.say(f"warning: {line}")

    loss, eval_loss = _number(metrics.last.get("loss")), metrics.last.get("eval_loss")
    model.train()
    stop = StopSignals()
    try:
        for step in range(done, total_steps):
            batches = _batches(train_set, order.step(window, step), config.batch_size, tokenizer.pad_id)
            counts = count_window(batches)
            rate = _rate(config, step, total_steps)
            with speed.measured(counts.tokens):
                loss, grad_norm = _update(
                    model, batches, counts.learnt_tokens, parameters, optimizer, rate, config.max_grad_norm, skips
                )
            now = step + 1
            row: dict[str, Any] = {"step": now, "loss": loss, "grad_norm": grad_norm, "learning_rate": rate}
            row |= {"examples": counts.examples, "learnt_tokens": counts.learnt_tokens}
            row |= {"padding": round(counts.padding, 4), "tokens": speed.tokens, "seconds": round(speed.seconds, 3)}
            row |= {"tokens_per_second": round(speed.tokens_per_second, 1), "peak_memory_bytes": peak_memory_bytes()}
            row |= {"skipped": skips.total} | paging(optimizer)
            last = now == total_steps
            if eval_set and (last or (config.eval_every and now % config.eval_every == 0)):
                eval_loss = evaluate_loss(model, eval_set.examples, config.batch_size, tokenizer.pad_id)
                row["eval_loss"] = eval_loss
                progress.say(f"step {now}: loss {eval_loss:.4f} on {len(eval_set.examples)} held-out rows")
            progress.update(now, loss=loss, learning_rate=rate, tokens_per_second=speed.tokens_per_second)
            metrics.append(**row)
            stopping = stop.asked and not last
            if world.is_main() and (stopping or (config.save_every and now % config.save_every == 0)):
                counters = {"seconds": speed.seconds, "tokens": speed.tokens}
                counters |= {"skipped": skips.total, "skipped_in_a_row": skips.in_a_row}
                save_checkpoint(out / "checkpoints", now, parameters, optimizer, counters, config.keep_checkpoints)
            if stopping:
                raise stop.interrupted(out, now)
    finally:
        stop.restore()
        progress.close()
    result = RunResult(
        config.out, total_steps, loss, eval_loss, speed.seconds, speed.tokens_per_second, peak_memory_bytes()
    )
    if world.is_main():
        write_results(config, model, tokenizer, metrics.path, held_out, progress)
    return Trained(model, tokenizer, result)


def _number(loss: float | None) -> float:
    """metrics.jsonl has null for a loss that was not finite."""
    return math.nan if loss is None else loss


def read_dataset(source: str) -> tuple[list[dict[str, Any]], Schema]:
    """The rows of a data file and the shape they were found to have."""
    rows = read_rows(source)
    return rows, detect(rows, source)


def prepare_model(config: SFTConfig) -> Decoder:
    """The base model as the method wants it, with its adapter if it has one. Seeds torch for the start of A."""
    torch.manual_seed(config.seed)
    model = _load(config, config.model)
    if config.method != "full":
        add_adapter(model, config.lora())
    model.gradient_checkpointing = config.gradient_checkpointing
    return model


def _load(config: SFTConfig, source: str | Path) -> Decoder:
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    if config.method == "full":
        model = load_model(source, dtype=torch.float32)
        if any(isinstance(module, LinearNF4) for module in model.modules()):
            raise ValueError(f"{source} is in 4 bits, which method full cannot train: take qlora, or a dense model")
        model.compute_dtype = dtype
        return model
    quantize = config.quant_type if config.method == "qlora" else None
    return load_model(
        source, dtype=dtype, quantize=quantize, blocksize=config.blocksize, double_quant=config.double_quant
    )


def _finished(config: SFTConfig, tokenizer: Tokenizer, last_row: dict[str, Any], *, quiet: bool) -> Trained:
    """A run that needs no more training, as its folder has it."""
    out, step, loss = Path(config.out), last_row["step"], _number(last_row["loss"])
    if config.method == "full":
        model = _load(config, out / "model")
    else:
        model = _load(config, config.model)
        load_adapter(model, out / "adapter", trainable=True)
    progress = ProgressLine(step, step, quiet=quiet or not world.is_main())
    progress.say(f"{out} is finished already: {step} steps, the last with loss {loss:.4f}; nothing was trained")
    progress.close()
    measured = (last_row[key] for key in ("seconds", "tokens_per_second", "peak_memory_bytes"))
    return Trained(model, tokenizer, RunResult(config.out, step, loss, last_row.get("eval_loss"), *measured))


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
        warmup_steps=_warmup_steps(config, total_steps),
        examples_per_update=window * len(train_set.examples) / order.n_rows,
        padding=order.padding(config.batch_size),
        packing=config.packing,
    )


def _batches(train_set: EncodedDataset, rows: list[list[int]], batch_size: int, pad_id: int) -> list[Batch]:
    """This rank's micro-batches of an update over `rows` of example numbers."""
    examples = [[train_set.examples[i] for i in row] for row in world.my_rows(rows)]
    return [collate_packed(part, pad_id=pad_id) for part in split(examples, batch_size)]


def _update(
    model: Decoder,
    batches: list[Batch],
    num_items: int,
    parameters: Any,
    optimizer: torch.optim.Optimizer,
    rate: float,
    clip: float,
    skips: Skips,
) -> tuple[float, float]:
    def loss_of(batch: Batch) -> Tensor:
        nll = per_token_nll(model, batch.input_ids, batch.segment_ids, batch.completion_mask)
        return sft_loss(nll, batch.completion_mask, num_items)

    return train_step(batches, loss_of, parameters, optimizer, learning_rate=rate, max_grad_norm=clip, skips=skips)


def _rate(config: SFTConfig, step: int, total_steps: int) -> float:
    warmup = _warmup_steps(config, total_steps)
    return learning_rate(
        step, total_steps=total_steps, peak=config.peak_rate, warmup_steps=warmup, schedule=config.schedule
    )


def _warmup_steps(config: SFTConfig, total_steps: int) -> int:
    return round(config.warmup_ratio * total_steps)


def evaluate_loss(model: Decoder, examples: list[Encoded], batch_size: int, pad_id: int) -> float:
    """Mean loss per learnt token over the examples, in nats."""

    def nll_of(batch: Batch) -> tuple[Tensor, int]:
        nll = per_token_nll(model, batch.input_ids, batch.segment_ids, batch.completion_mask)
        return nll.sum(), int(batch.completion_mask[:, 1:].sum())

    return evaluate(model, [collate(part, pad_id=pad_id) for part in split(examples, batch_size)], nll_of)


def _encode(config: SFTConfig, tokenizer: Tokenizer, data: Dataset) -> EncodedDataset:
    length = config.max_seq_length
    return encode_dataset(tokenizer, data.rows, data.schema, max_seq_length=length, path=data.path, learn=config.learn)
