"""Settings for supervised fine-tuning: a model, the lengths of the rows and a memory in, advice with its reasons out.

| knob | rule | sources, and where they differ |
|---|---|---|
| method | LoRA if its dense base fits, else QLoRA; full above 1M rows | LoRA Without Regret |
| r | 16; 32 from 50,000 rows, 64 from 500,000 | 16 to 64; Unsloth 16 or 32; QLoRA 64; LoRA Without Regret up to 256 |
| alpha | r | Unsloth r or 2r; torchtune 2r; QLoRA 16 whatever r is |
| targets | all linear layers | QLoRA fig. 2; LoRA Without Regret |
| learning rate | 2e-4, above 13B 1e-4; full a tenth | QLoRA; full 1e-5 to 2e-5; torchtune 3e-4 |
| epochs | 1 above 2M rows, 2 from 1M, else 3 | 1 to 2 above 2M, 3 to 4 below 1M; Unsloth 1 to 3 |
| sequence length | the longest row, at most half of the context | 25 to 50% of the context; Unsloth starts at 2048 |
| batch | 16 in one forward, or 8, …, as memory allows | 8 or more; QLoRA 16 an update; LoRA Without Regret under 32 |

A tenth of the memory is left free, for the allocator and the process. The plan is trainers/memory.py's.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from models import DecoderConfig

from .memory import Plan, Setup, plan
from .memory_exact import count

FREE = 0.1
ROUND = 64
MANY, VERY_MANY = 1_000_000, 2_000_000
BATCHES = (16, 8, 4, 2, 1)
AN_UPDATE = 16
RANKS = (64, 32, 16)


class Advice(NamedTuple):
    """A flag, its value, why, and who says so."""

    flag: str
    value: Any
    reason: str
    source: str


@dataclass(frozen=True)
class Recommendation:
    """Advice, and the plan of the run that follows it."""

    advice: tuple[Advice, ...]
    plan: Plan

    def flags(self) -> dict[str, Any]:
        """As SFTConfig's fields."""
        return {one.flag: one.value for one in self.advice}


def recommend(
    config: DecoderConfig, lengths: Sequence[int], budget: int, *, name: str = "the model", on_gpu: bool = False
) -> Recommendation:
    """For rows of these lengths in tokens, and `budget` bytes of memory.

    Raises ValueError when there is no row, and when not even one row in QLoRA fits, with what it would take.
    """
    if not lengths:
        raise ValueError("there are no rows to learn from")
    length = _sequence_length(config, lengths)
    dtype = "fp32" if count(config).total < 1e9 else "bf16"
    base = Setup(sequence_length=length.value, dtype=dtype, on_gpu=on_gpu)
    found, r = None, _rank(len(lengths))
    for smaller in (rank for rank in RANKS if rank <= r.value):
        found = found or _fitting(config, _changed(base, {"r": smaller}), len(lengths), budget * (1 - FREE))
    if found is None:
        raise ValueError(_refusal(config, base, budget, name))
    setup = found.setup
    if setup.r < r.value:
        r = r._replace(value=setup.r, reason=f"{r.value} would suit {r.reason}, but does not fit")
    return Recommendation(
        (
            Advice("method", setup.method, *_why_method(setup, len(lengths), budget)),
            *((r, *_about_adapters(setup.r)) if setup.method != "full" else ()),
            _learning_rate(config, setup.method),
            _epochs(len(lengths)),
            Advice("max_seq_length", *length[1:]),
            *_batch(setup),
            Advice("dtype", dtype, f"{count(config).total:,} parameters", "bf16 from 1B on; below, fp32 is cheap"),
        ),
        found,
    )


def _sequence_length(config: DecoderConfig, lengths: Sequence[int]) -> Advice:
    context, longest = config.max_position_embeddings, max(lengths)
    value = min(math.ceil(longest / ROUND) * ROUND, context // 2)
    cut = sum(length > value for length in lengths)
    reason = f"the longest of {len(lengths):,} rows has {longest:,} tokens"
    reason += f"; {cut:,} rows are cut at half of the context, {context:,}" if cut else ""
    return Advice("max_seq_length", value, reason, f"25 to 50% of the context would be {context // 4:,} to "
                  f"{context // 2:,}; more than the rows have is padding")  # fmt: skip


def _rank(rows: int) -> Advice:
    r = 16 if rows < 50_000 else 32 if rows < 500_000 else 64
    return Advice("r", r, f"{rows:,} rows", "16 to 64: Unsloth 16 or 32, QLoRA 64; more data, more rank")


def _about_adapters(r: int) -> Iterator[Advice]:
    yield Advice("alpha", float(r), "an update scaled by 1", "r or 2r (Unsloth); torchtune 2r, QLoRA 16")
    yield Advice("target_modules", "all-linear", "attention alone learns less", "QLoRA fig. 2, LoRA Without Regret")


def _learning_rate(config: DecoderConfig, method: str) -> Advice:
    large = count(config).total > 13.5e9
    rate = (1e-5 if large else 2e-5) if method == "full" else (1e-4 if large else 2e-4)
    size = "above 13B" if large else "up to 13B"
    return Advice("learning_rate", rate, f"{method}, {size}", "full 1e-5 to 2e-5, LoRA ten times as much (QLoRA)")


def _epochs(rows: int) -> Advice:
    value = 1.0 if rows > VERY_MANY else 2.0 if rows >= MANY else 3.0
    return Advice("epochs", value, f"{rows:,} rows", "1 to 2 above 2M rows, 3 to 4 below 1M; Unsloth 1 to 3")


def _batch(setup: Setup) -> Iterator[Advice]:
    source = "8 or more as memory allows; QLoRA 16, LoRA Without Regret under 32"
    few = "" if setup.batch_size >= 8 else ", fewer than 8 in one forward since no more fit"
    yield Advice("batch_size", setup.batch_size, f"{setup.batch_size} rows of {setup.sequence_length} fit{few}", source)
    rows = setup.batch_size * setup.accumulation
    yield Advice("accumulation", setup.accumulation, f"{rows} rows an update", source)
    reason = "the batch would not fit without" if setup.gradient_checkpointing else "there is room for all activations"
    yield Advice("gradient_checkpointing", setup.gradient_checkpointing, reason, "a third more time, far less memory")


def _fitting(config: DecoderConfig, base: Setup, rows: int, room: float) -> Plan | None:
    """The first choice that takes 8 rows in one forward, else the one that takes most rows."""
    best: Plan | None = None
    for method in (["full"] if rows > MANY else []) + ["lora", "qlora"]:
        for checkpointing in (False, True):
            found = _largest_batch(config, base, method, checkpointing, room)
            if found is not None and found.setup.batch_size >= 8:
                return found
            if found is not None and (best is None or found.setup.batch_size > best.setup.batch_size):
                best = found
    return best


def _largest_batch(config: DecoderConfig, base: Setup, method: str, checkpointing: bool, room: float) -> Plan | None:
    for batch in BATCHES:
        values = {"method": method, "gradient_checkpointing": checkpointing}
        found = plan(config, _changed(base, values | {"batch_size": batch, "accumulation": AN_UPDATE // batch}))
        if found.total <= room:
            return found
    return None


def _changed(setup: Setup, values: dict[str, Any]) -> Setup:
    return Setup(**{**vars(setup), **values})


def _why_method(setup: Setup, rows: int, budget: int) -> tuple[str, str]:
    if setup.method == "full":
        return f"{rows:,} rows, and all of it fits", "LoRA falls behind when the data outgrow it (LoRA Without Regret)"
    if setup.method == "lora":
        return "the dense base fits: nothing is rounded", "LoRA keeps up with full fine-tuning (LoRA Without Regret)"
    return f"a dense base leaves too little of {budget / 1e9:g} GB", "4 bits lose nothing measurable (QLoRA, table 3)"


def _refusal(config: DecoderConfig, base: Setup, budget: int, name: str) -> str:
    values = {"method": "qlora", "gradient_checkpointing": True, "batch_size": 1}
    least = plan(config, _changed(base, values))
    weights = sum(part.nbytes for part in least.always)
    return (
        f"{name} cannot be trained in {budget / 1e9:g} GB: QLoRA with one row of {base.sequence_length:,} tokens and "
        f"checkpointing takes {least.total / 1e9:.2f} GB, {weights / 1e9:.2f} of them weights, adapters and optimizer "
        f"state, and a tenth must stay free: take a smaller model, shorter rows or more memory"
    )
