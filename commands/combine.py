"""qlora combine: several adapters of one base into one, as a weighted sum of their updates."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from lora import combine_adapters, load_adapter, save_adapter
from lora.adapters import lora_layers
from models import load_model, load_tokenizer


@dataclass(frozen=True)
class CombineArgs:
    """Make one adapter of several, which all belong to the same base."""

    model: Annotated[str, tyro.conf.Positional]
    """Their base: built-in name, Hugging Face folder, .gguf file, or hub id."""
    out: Annotated[str, tyro.conf.Positional]
    """Folder to write; an adapter that is there already is replaced."""
    adapters: tuple[str, ...]
    """Adapter folders, two or more. The chat template of the first goes with the result."""
    weights: tuple[float, ...] = ()
    """One for each; 1 by default."""
    method: Literal["cat", "svd", "ties"] = "cat"
    """cat: the exact sum, of all their ranks; svd: the sum cut to --r; ties: conflicts settled, then cut to --r."""
    r: int | None = None
    """Rank of the result, for svd and ties; by default the largest of theirs."""
    density: float = 0.2
    """Share of each update that ties keeps."""


def run(args: CombineArgs) -> None:
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model)
    names = [f"adapter_{number}" for number in range(1, len(args.adapters) + 1)]
    for name, folder in zip(names, args.adapters, strict=True):
        load_adapter(model, folder, name)
    weights = args.weights or None
    combine_adapters(model, names, weights, method=args.method, r=args.r, density=args.density)
    beside = tokenizer.with_chat_of(args.adapters[0]).save
    save_adapter(model, args.out, "combined", base_model_name=args.model, beside=beside)
    ranks = sorted({layer.lora_A["combined"].shape[0] for layer in lora_layers(model).values()})
    rank = " to ".join(map(str, dict.fromkeys([ranks[0], ranks[-1]])))
    print(f"{args.out}: {args.method} of {len(names)} adapters, rank {rank}")
