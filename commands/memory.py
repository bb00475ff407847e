"""qlora memory: what a run will hold, before anything is loaded; and turned round, what a card of some size can take.

    qlora memory llama-3.1-8b --sequence-length 2048 --batch-size 1 --gradient-checkpointing

MODEL is a well-known name (models/well_known.py), a config.json, or what --model takes elsewhere. GB are 10⁹ bytes.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from lora import LoRAConfig, add_adapter
from models import DecoderConfig, load_model
from models.config import read_config
from models.source import locate
from models.well_known import WELL_KNOWN
from trainers.memory import Plan, Setup, largest_batch, largest_model, longest_sequence, plan, plan_of_model

METHODS = ("full", "lora", "qlora")
CARDS = (8, 16, 24, 48, 80)
ORDER = (
    "weights of the model",
    "linear weights",
    "4-bit weights",
    "scales of the 4-bit weights",
    "embeddings and head",
    "norms and biases",
    "teacher",
    "reference model",
    "adapters",
    "gradients",
    "optimizer state",
    "activations",
    "logits",
    "KV cache",
    "workspace",
)
SHORT = {"lora": "LoRA", "qlora": "QLoRA"}


@dataclass(frozen=True)
class MemoryArgs:
    """What a run will hold: weights, adapters, gradients, optimizer state, activations. And what fits in a card."""

    model: Positional[str] = "smollm2-135m"
    """Well-known name (llama-3.1-8b, qwen2.5-7b, …), config.json, Hugging Face folder, or hub id."""
    method: Literal["all", "full", "lora", "qlora"] = "all"
    """What is trained; all compares the three."""
    trainer: Literal["sft", "dpo", "orpo", "distill", "grpo"] = "sft"
    """The command that trains."""
    batch_size: int = 1
    """Rows in one forward; pairs for dpo and orpo; for grpo completions, whole groups."""
    sequence_length: int = 1024
    """Tokens of every row; for grpo prompt and completion together."""
    accumulation: int = 4
    """Forwards in one update."""
    gradient_checkpointing: bool = False
    """Keep one activation a layer."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Frozen weights and activations; the trainers' own default is fp32."""
    optimizer: Literal["adamw", "paged_adamw", "paged_adamw_8bit"] = "paged_adamw"
    """As in training."""
    optimizer_budget: int | None = None
    """Bytes of optimizer state in fast memory; the rest is spilled."""
    r: int = 16
    """LoRA rank."""
    blocksize: int = 64
    """Weights that share one scale (qlora)."""
    double_quant: bool = True
    """Quantize the scales too (qlora)."""
    num_generations: int = 8
    """grpo: completions of a prompt."""
    max_completion_length: int = 256
    """grpo: tokens of the longest completion."""
    teacher: str | None = None
    """distill: the teacher, named as MODEL is; without one its predictions come from --teacher-cache."""
    on_gpu: bool = False
    """Count what kernels on a GPU hold: one 4-bit weight made dense at a time."""
    load: bool = False
    """Load the model, and count the bytes that it really holds."""
    json: str | None = None
    """Write the plans here too."""
    plot: str | None = None
    """Draw them here, as stacked bars (PNG; needs the extra `plot`)."""


def run(args: MemoryArgs) -> None:
    config = shape_of(args.model)
    plans = {}
    for method in METHODS if args.method == "all" else (args.method,):
        setup = setup_of(args, method)
        plans[method] = plan_of_model(_loaded(args.model, setup), setup) if args.load else plan(config, setup)
    console = Console()
    console.print(_parts_table(args.model, plans), markup=False)
    for line in _sentences(plans):
        print(line)
    fits = what_fits(config, {method: planned.setup for method, planned in plans.items()})
    console.print(_fits_table(fits), markup=False)
    if args.json is not None:
        _write(Path(args.json), json.dumps(as_json(args.model, plans, fits), indent=2).encode() + b"\n")
        print(f"wrote {args.json}")
    if args.plot is not None:
        draw(args.model, plans, Path(args.plot))
        print(f"wrote {args.plot}")


def shape_of(source: str) -> DecoderConfig:
    """The config that `source` names. Raises ValueError where there is none."""
    if source.lower() in WELL_KNOWN:
        return WELL_KNOWN[source.lower()]
    path = Path(source)
    if path.suffix == ".json" and path.is_file():
        return read_config(path)
    try:
        found = locate(source, ("config.json",))
    except ValueError as error:
        raise ValueError(f"{error}; well-known here: {', '.join(WELL_KNOWN)}") from None
    if found.is_file():
        raise ValueError(f"{source}: a plan is made from a config.json, which a .gguf file has not: name a folder")
    return read_config(found / "config.json")


def setup_of(args: MemoryArgs, method: str) -> Setup:
    names = {one.name for one in fields(Setup)} & {one.name for one in fields(args)}
    values = {name: getattr(args, name) for name in names}
    teacher = None if args.teacher is None else shape_of(args.teacher)
    return Setup(**values | {"method": method, "teacher": teacher})


def what_fits(config: DecoderConfig, setups: Mapping[str, Setup]) -> dict[int, dict[str, dict[str, Any]]]:
    """By card (GB) and method: the longest sequence, the largest batch, the largest well-known model."""
    return {
        card: {
            method: {
                "longest_sequence": longest_sequence(config, setup, card * 10**9),
                "largest_batch": largest_batch(config, setup, card * 10**9),
                "largest_model": largest_model(WELL_KNOWN, setup, card * 10**9),
            }
            for method, setup in setups.items()
        }
        for card in CARDS
    }


def as_json(model: str, plans: Mapping[str, Plan], fits: Mapping[int, Any]) -> dict[str, Any]:
    return {
        "model": model,
        "plans": {
            method: {
                "total": planned.total,
                "exact": planned.exact,
                "peak": planned.peak.name,
                "parameters": planned.counts.total,
                "trained": planned.trained,
                "spilled": planned.spilled,
                "parts": [{"name": p.name, "bytes": p.nbytes, "exact": p.exact, "why": p.why} for p in planned.parts],
                "phases": {phase.name: phase.nbytes for phase in planned.phases},
            }
            for method, planned in plans.items()
        },
        "fits": {str(card): found for card, found in fits.items()},
    }


def draw(model: str, plans: Mapping[str, Plan], path: Path) -> None:
    """Stacked bars, estimates hatched. Raises ValueError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: run `pip install matplotlib`") from None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    below = [0.0] * len(plans)
    for name in _names(plans):
        found = [next((p for p in planned.parts if p.name == name), None) for planned in plans.values()]
        heights = [0.0 if part is None else part.nbytes / 1e9 for part in found]
        exact = all(part is None or part.exact for part in found)
        axes.bar([SHORT.get(m, m) for m in plans], heights, bottom=below, label=name, hatch=None if exact else "//")
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set(ylabel="GB (hatched: estimates)", title=model)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    temporary = path.with_name(path.name + ".tmp")
    try:
        figure.savefig(temporary, dpi=120, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _loaded(source: str, setup: Setup) -> Any:
    dtype = torch.bfloat16 if setup.dtype == "bf16" and setup.method != "full" else torch.float32
    quantize = "nf4" if setup.method == "qlora" else None
    model = load_model(
        source, dtype=dtype, quantize=quantize, blocksize=setup.blocksize, double_quant=setup.double_quant
    )
    if setup.method != "full":
        add_adapter(model, LoRAConfig(r=setup.r, alpha=setup.r))
    return model


def _names(plans: Mapping[str, Plan]) -> list[str]:
    """Of all parts, in order."""
    there = {part.name for planned in plans.values() for part in planned.parts}
    return [name for name in ORDER if name in there]


def _parts_table(model: str, plans: Mapping[str, Plan]) -> Table:
    table = Table("GB at the peak", "how", *(SHORT.get(m, m) for m in plans), "what", title=model)
    for name in _names(plans):
        parts = {m: next((p for p in planned.parts if p.name == name), None) for m, planned in plans.items()}
        one = next(part for part in reversed(list(parts.values())) if part is not None)
        shown = ["" if part is None else f"{part.nbytes / 1e9:.3f}" for part in parts.values()]
        table.add_row(name, "exact" if one.exact else "estimate", *shown, one.why)
    table.add_section()
    table.add_row("exact parts", "exact", *(f"{planned.exact / 1e9:.3f}" for planned in plans.values()), "")
    table.add_row("total", "estimate", *(f"{planned.total / 1e9:.3f}" for planned in plans.values()), "at the peak")
    return table


def _sentences(plans: Mapping[str, Plan]) -> list[str]:
    first = next(iter(plans.values()))
    said = [f"{first.counts.total:,} parameters; the peak is in the " + ", ".join(
        f"{planned.peak.name} ({SHORT.get(m, m)})" for m, planned in plans.items())]  # fmt: skip
    if "full" in plans:
        said.append("full holds its weights in fp32, whatever the activations are")
    if {"lora", "qlora"} <= set(plans):
        lora, qlora = plans["lora"].total, plans["qlora"].total
        if qlora > lora:
            said.append(f"QLoRA needs {(qlora - lora) / 1e9:.3f} GB more than LoRA here: the model is small")
        else:
            said.append(f"QLoRA needs {(lora - qlora) / 1e9:.3f} GB ({1 - qlora / lora:.0%}) less than LoRA here")
    said.append("beside it: Python and its libraries (0.5 GB and more), a CUDA context, what an allocator keeps back")
    return said


def _fits_table(fits: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> Table:
    table = Table(
        "card", "method", "longest sequence", "largest batch", "largest model", title="What fits, all else equal"
    )
    for card, methods in fits.items():
        for method, found in methods.items():
            length, batch = found["longest_sequence"], found["largest_batch"]
            shown = (f"{length:,}" if length else "none", f"{batch:,}" if batch else "none")
            table.add_row(f"{card} GB", SHORT.get(method, method), *shown, found["largest_model"] or "none")
    return table


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
