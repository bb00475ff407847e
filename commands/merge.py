"""qlora merge: an adapter made part of its base, written as an ordinary model folder, dense or in 4 bits.

A merge rounds: to the dense dtype a little, to 4 bits a lot, at worst so much that the adapter is gone. So the report
says what was lost beside what the adapter does, in the weights and on a text:

    ‖W' - (W + s·BA)‖ / ‖s·BA‖             by layer; W is what the adapter is merged onto
    KL(with adapter ‖ merged)              what merging costs
    KL(with adapter ‖ base alone)          what the adapter brings; merging should cost a small part of it

"With adapter" is the model as --quantize holds it. The weights that the adapter is merged onto may be others (--onto):
into 4 bits, updates smaller than the steps vanish on weights that lie on those steps already, and come through in part
on the original ones, which bring other rounding errors. Which is better depends on both, so both are tried.
The report is printed, and saved as merge_report.json in the folder. The chat template that the adapter was trained with
goes into the folder too.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from rich.console import Console
from rich.table import Table

from data import DataFlags, encode_dataset, read_datasets
from lora import LinearNF4, MergeReport, disabled_adapters, load_adapter, merge_adapter, quantize_model
from models import Decoder, Tokenizer, load_model, load_tokenizer, save_model
from models.compare import Difference, compare, outputs
from models.save import check_target
from trainers.run_folder import write_json

from .loaded import with_chat
from .quantize import DTYPES

REPORT = "merge_report.json"
ROW_TOKENS = 1024
TOO_MUCH = 0.5  # of the adapter's own KL
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
    """How the base was held in training, the model to be equal to: for a QLoRA adapter nf4."""
    blocksize: int = 64
    """Of --quantize, as in training."""
    double_quant: bool = True
    """Of --quantize, as in training."""
    onto: Literal["auto", "held", "original"] = "auto"
    """What to add the adapter to: the weights as --quantize holds them, or as the model's files have them. auto: into
    4 bits both, and the one that stays nearer to the model with its adapter is written; held where it is dense."""
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = "keep"
    """Of the dense weights; keep: the model's own."""
    data: str | None = None
    """Rows to compare the models on, best the adapter's own task; by default four short conversations."""
    tokens: int = 512
    """How many tokens of them, at most."""


class Merged(NamedTuple):
    model: Decoder
    report: MergeReport
    cost: Difference
    onto: str


def run(args: MergeArgs) -> None:
    if args.tokens < 1:
        raise ValueError(f"--tokens must be at least 1, got {args.tokens}")
    check_target(args.out)
    tokenizer, _ = with_chat(load_tokenizer(args.model), None, args.adapter)
    rows = sample(tokenizer, args.data, args.tokens)
    merged, tried, gain = merge_and_measure(args, rows)
    warnings = complaints(args.into, merged.cost, gain)
    show(merged.report, tried, gain)
    save_model(merged.model, args.out, tokenizer=tokenizer)
    write_json(Path(args.out) / REPORT, as_json(args, merged, tried, gain, sum(map(len, rows)), warnings))
    for warning in warnings:
        print(f"warning: {warning}")
    print(f"{args.out}: merged into {args.into}, onto the {merged.onto} weights; the report is in {REPORT}")


def sample(tokenizer: Tokenizer, data: str | None, tokens: int) -> list[list[int]]:
    """At most `tokens` ids of text, as rows: of a dataset, or of SAMPLE in the model's own chat template."""
    if data is None:
        turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in SAMPLE]
        rows = [tokenizer.apply_chat_template(messages) for messages in turns]
    else:
        read, _ = read_datasets(DataFlags(data=data))
        encoded = encode_dataset(tokenizer, read.rows[:64], read.schema, max_seq_length=ROW_TOKENS, path=data)
        rows = [example.ids for example in encoded.examples]
    kept: list[list[int]] = []
    for row in rows:
        kept.append(row[:tokens])
        tokens -= len(kept[-1])
    return [row for row in kept if row]


def merge_and_measure(args: MergeArgs, rows: list[list[int]]) -> tuple[Merged, dict[str, Difference], Difference]:
    """(the best merge, what each way of merging changed on `rows`, what the adapter does there)."""
    model = adapted_model(args, args.quantize)
    if args.into == "nf4" and not any(isinstance(module, LinearNF4) for module in model.modules()):
        raise ValueError(
            "--into nf4 needs a base in 4 bits, as in training: add --quantize nf4, or give a 4-bit folder"
        )
    wanted = outputs(model, rows)
    with disabled_adapters(model):
        gain = compare(wanted, outputs(model, rows))
    ways = [args.onto] if args.onto != "auto" else ["held", "original"] if args.into == "nf4" else ["held"]
    if args.quantize == "none":
        ways = ["held"]  # which is how the files have it
    tried: dict[str, Difference] = {}
    for onto in ways:
        changed, report = (
            merged_onto_original(args) if onto == "original" else (model, merge_adapter(model, into=args.into))
        )
        tried[onto] = compare(wanted, outputs(changed, rows))
        if tried[onto].kl == min(cost.kl for cost in tried.values()):
            best = Merged(changed, replace(report, originals={}), tried[onto], onto)
    return best, tried, gain


def adapted_model(args: MergeArgs, quantize: str) -> Decoder:
    model = load_model(
        args.model,
        dtype=DTYPES[args.dtype],
        quantize=None if quantize == "none" else quantize,
        blocksize=args.blocksize,
        double_quant=args.double_quant,
    )
    load_adapter(model, args.adapter)
    return model


def merged_onto_original(args: MergeArgs) -> tuple[Decoder, MergeReport]:
    """The model as its files have it, with the adapter merged in, then in 4 bits if those are wanted."""
    model = adapted_model(args, "none")
    is_dense = not any(isinstance(module, LinearNF4) for module in model.modules())
    form: dict[str, Any] = {
        "quant_type": args.quantize,
        "blocksize": args.blocksize,
        "double_quant": args.double_quant,
    }
    report = merge_adapter(model, into=args.into, **form)
    if args.into == "nf4" and is_dense:
        quantize_model(model, **form)  # the layers without an adapter
    return model, report


def complaints(into: str, cost: Difference, gain: Difference) -> list[str]:
    """What is wrong with this merge, a line each. Weight errors are no sign: see lora/merge.py."""
    found = []
    if gain.kl > 0 and cost.kl >= TOO_MUCH * gain.kl:
        found.append(
            f"merging into {into} loses {cost.kl / gain.kl:.0%} of what the adapter brings: KL {cost.kl:.3g} to the "
            f"model with its adapter, which is {gain.kl:.3g} from the base alone; merge into dense, or keep the adapter"
        )
    if gain.kl == 0:
        found.append("the adapter changes nothing on this text: its B is zero, or the text is not of its task")
    return found


def show(report: MergeReport, tried: dict[str, Difference], gain: Difference) -> None:
    """Weight errors by kind of layer, then what each way of merging and the adapter itself change."""
    kinds: dict[str, list[float]] = {}
    for path, error in report.weight_error.items():
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", path), []).append(error)
    table = Table("layers", "how many", "weight error, mean", "largest")
    for kind, errors in kinds.items():
        table.add_row(kind, str(len(errors)), f"{sum(errors) / len(errors):.2e}", f"{max(errors):.2e}")
    Console().print(table, markup=False)
    print(f"weight error over all layers: {report.total_error:.2e} of the adapter's size")
    changes = {f"merging onto the {onto} weights": cost for onto, cost in tried.items()} | {"the adapter": gain}
    for what, change in changes.items():
        print(
            f"{what} changes: KL {change.kl:.3e} nats a token, largest logit change {change.largest_logit_change:.3g}"
        )


def as_json(
    args: MergeArgs, merged: Merged, tried: dict[str, Difference], gain: Difference, tokens: int, warnings: list[str]
) -> dict[str, Any]:
    return {
        "model": args.model,
        "adapter": args.adapter,
        "into": args.into,
        "quantize": args.quantize,
        "onto": merged.onto,
        "weight_error": merged.report.weight_error,
        "adapter_size": merged.report.adapter_size,
        "total_weight_error": merged.report.total_error,
        "text": args.data or "built-in sample",
        "tokens": tokens,
        "merging": merged.cost._asdict(),
        "tried": {onto: cost._asdict() for onto, cost in tried.items()},
        "adapter_effect": gain._asdict(),
        "warnings": warnings,
    }
