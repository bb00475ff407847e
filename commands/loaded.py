"""A model and its tokenizer, ready to answer: what generate, chat, probe and inspect share."""

from dataclasses import dataclass
from typing import Literal

import torch

from lora import load_adapter
from models import Decoder, Tokenizer, load_model, load_tokenizer


@dataclass(frozen=True)
class ModelArgs:
    """Which model, and how it is held."""

    model: str = "smollm2-135m"
    """Built-in name, Hugging Face folder, .gguf file, or hub id."""
    adapter: str | None = None
    """Adapter folder in PEFT's format, for example runs/first/adapter."""
    quantize: Literal["none", "nf4", "fp4"] = "none"
    """Hold the linear layers in 4 bits, as QLoRA training did."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Dense weights and activations."""


def load(args: ModelArgs) -> tuple[Decoder, Tokenizer]:
    """The model in eval mode, with its adapter, and its tokenizer. Raises ValueError for what cannot be loaded."""
    tokenizer = load_tokenizer(args.model)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    model = load_model(args.model, dtype=dtype, quantize=None if args.quantize == "none" else args.quantize)
    if args.adapter is not None:
        load_adapter(model, args.adapter)
    return model.eval(), tokenizer
