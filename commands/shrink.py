"""qlora shrink: a model with some of its layers, as a folder: a student for `qlora distill`, or a small base."""

from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

from lora import count_parameters
from models import load_model, load_tokenizer, save_model
from models.save import check_target
from models.shrink import evenly, shrink


@dataclass(frozen=True)
class ShrinkArgs:
    """Write a model with some of its layers. It is a start, and no good model until it is taught (qlora distill)."""

    model: Annotated[str, tyro.conf.Positional]
    """Built-in name, Hugging Face folder, .gguf file, or hub id."""
    out: Annotated[str, tyro.conf.Positional]
    """Folder to write; a model folder that is there already is replaced."""
    layers: int
    """How many layers to keep, evenly spread, the first and the last among them."""


def run(args: ShrinkArgs) -> None:
    check_target(args.out)
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, dtype=torch.float32)
    before, kept = count_parameters(model)[1], evenly(model.config.num_hidden_layers, args.layers)
    save_model(shrink(model, kept), args.out, tokenizer=tokenizer)
    print(f"{args.out}: layers {', '.join(map(str, kept))} of {args.model}")
    print(f"{count_parameters(model)[1]:,} of {before:,} parameters")
