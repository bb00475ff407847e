"""qlora merge: an adapter made part of its base, written as an ordinary model folder, dense or in 4 bits.

A merge rounds: to the dense dtype a little, to 4 bits a lot, at worst so much that the adapter is gone. So the report
says what was lost beside what the adapter does, in the weights and on a text:

    ‖W' - (W + s·BA)‖ / ‖s·BA‖             by layer; 1 is as much as the adapter itself
    KL(with adapter ‖ merged)              what merging costs
    KL(with adapter ‖ base alone)          what the adapter brings; merging should cost a small part of it

It is printed, and saved as merge_report.json in the folder.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from data.encode import encode_dataset
from lora import LinearNF4, MergeReport, disabled_adapters, load_adapter, merge_adapter
from models import Decoder, Tokenizer, load_model, load_tokenizer, save_model
from models.compare import Difference, compare, outputs
from models.save import check_target
from trainers.sft import read_dataset

from .quantize import DTYPES

REPORT = "merge_report.json"
ROW_TOKENS = 1024
SAMPLE = [
    ("What is the capital of France?", "The capital of France is Paris, a city on the river Seine."),
    ("Write a function that adds two numbers.", "def add(a: float, b: float) -> float:\n    return a + b"),
    ("Viết một câu về Hà Nội.", "Hà Nội là thủ đô của Việt Nam, một thành phố cổ bên sông Hồng."),
    ("Reply in JSON: Lan buys three mangoes.", '{"name": "Lan", "item": "mango", "quantity": 3}'),
]


@dataclass(frozen=True)
class MergeArgs:
    """Merge an adapter into its base model, and say what that costs."""

    model: Annotated[str, tyro.conf.Positional]
    """The base: built-in name, Hugging Face folder (dense or 4-bit), .gguf file, or hub id."""
    adapter: Annotated[str, tyro.conf.Positional]
    """Adapter folder in PEFT's format, for example runs/first/adapter."""
    out: Annotated[str, tyro.conf.Positional]
    """Folder to write; a model folder that is there already is replaced."""
    into: Literal["dense", "nf4"] = "dense"
    """dense: ordinary weights; nf4: 4 bits again, as the base is held."""
    quantize: Literal["none", "nf4", "fp4"] = "none"
    """How the base is held before merging. For a QLoRA adapter: as in its training, nf4."""
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = "keep"
    """Of the dense weights; keep: the model's own."""
    data: str | None = None
    """Rows to compare the models on, best the adapter's own task; by default four short conversations."""
    tokens: int = 512
    """How many tokens of them, at most."""


def run(args: MergeArgs) -> None:
    if args.tokens < 1:
        raise ValueError(f"--tokens must be at least 1, got {args.tokens}")
    check_target(args.out)
    tokenizer = load_tokenizer(args.model)
    rows = sample(tokenizer, args.data, args.tokens)
    model = load_model(
        args.model, dtype=DTYPES[args.dtype], quantize=None if args.quantize == "none" else args.quantize
    )
    if args.into == "nf4" and not any(isinstance(module, LinearNF4) for module in model.modules()):
        raise ValueError(
            "--into nf4 needs a base in 4 bits, as in training: add --quantize nf4, or give a 4-bit folder"
        )
    load_adapter(model, args.adapter)
    report, cost, gain = merge_and_measure(model, rows, args.into)
    warnings = complaints(args.into, report, cost, gain)
    show(report, cost, gain)
    save_model(model, args.out, tokenizer=tokenizer)
    content = as_json(args, report, sum(map(len, rows)), cost, gain, warnings)
    _write(Path(args.out) / REPORT, content)
    for warning in warnings:
        print(f"warning: {warning}")
    print(f"{args.out}: merged into {args.into}; the report is in {REPORT}")


def sample(tokenizer: Tokenizer, data: str | None, tokens: int) -> list[list[int]]:
    """At most `tokens` ids of text, as rows: of a dataset, or of SAMPLE in the model's own chat template."""
    if data is None:
        turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in SAMPLE]
        rows = [tokenizer.apply_chat_template(messages) for messages in turns]
    else:
        read, schema = read_dataset(data)
        encoded = encode_dataset(tokenizer, read[:64], schema, max_seq_length=ROW_TOKENS, path=data)
        rows = [example.ids for example in encoded.examples]
    kept: list[list[int]] = []
    for row in rows:
        kept.append(row[:tokens])
        tokens -= len(kept[-1])
    return [row for row in kept if row]


def merge_and_measure(model: Decoder, rows: list[list[int]], into: str) -> tuple[MergeReport, Difference, Difference]:
    """Merge the adapter in place. Returns the report, what merging changed on `rows`, and what the adapter did."""
    adapted = outputs(model, rows)
    with disabled_adapters(model):
        gain = compare(adapted, outputs(model, rows))
    report = merge_adapter(model, into=into)
    return report, compare(adapted, outputs(model, rows)), gain


def complaints(into: str, report: MergeReport, cost: Difference, gain: Difference) -> list[str]:
    """What is wrong with this merge, a line each."""
    found = []
    if cost.kl >= gain.kl > 0:
        found.append(
            f"merging into {into} costs more than the adapter brings: KL {cost.kl:.3g} to the model with its adapter, "
            f"which is itself {gain.kl:.3g} from the base; merge into dense, or keep the adapter beside the base"
        )
    if report.total_error >= 1:
        found.append(
            f"rounding to {into} changes the weights {report.total_error:.2f} times as much as the adapter does"
        )
    if gain.kl == 0:
        found.append("the adapter changes nothing on this text: its B is zero, or the text is not of its task")
    return found


def show(report: MergeReport, cost: Difference, gain: Difference) -> None:
    """Weight errors by kind of layer, then both differences."""
    kinds: dict[str, list[float]] = {}
    for path, error in report.weight_error.items():
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", path), []).append(error)
    table = Table("layers", "how many", "weight error, mean", "largest")
    for kind, errors in kinds.items():
        table.add_row(kind, str(len(errors)), f"{sum(errors) / len(errors):.2e}", f"{max(errors):.2e}")
    Console().print(table, markup=False)
    print(f"weight error over all layers: {report.total_error:.2e} of the adapter's size")
    print(f"merging changes:  KL {cost.kl:.3e} nats a token, largest logit change {cost.largest_logit_change:.3g}")
    print(f"adapter changes:  KL {gain.kl:.3e} nats a token, largest logit change {gain.largest_logit_change:.3g}")


def as_json(
    args: MergeArgs, report: MergeReport, tokens: int, cost: Difference, gain: Difference, warnings: list[str]
) -> dict[str, Any]:
    return {
        "model": args.model,
        "adapter": args.adapter,
        "into": args.into,
        "quantize": args.quantize,
        "weight_error": report.weight_error,
        "adapter_size": report.adapter_size,
        "total_weight_error": report.total_error,
        "text": args.data or "built-in sample",
        "tokens": tokens,
        "merging": cost._asdict(),
        "adapter_effect": gain._asdict(),
        "warnings": warnings,
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)
