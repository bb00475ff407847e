"""From a trainer's flags to the model it trains, and back to the one a finished run left."""

from pathlib import Path

import torch

from lora import LinearNF4, add_adapter, add_adapter_in_4bit, load_adapter
from lora.init import takes_from_weight
from models import Decoder, load_model

from .flags import TrainerFlags

BASE = "base"
"""Folder of a run whose 4-bit base is not the model's own: the adapter's start was taken out of it."""


def prepare_model(flags: TrainerFlags) -> Decoder:
    """The base model as the method wants it, with its adapter if it has one. Seeds torch for the start of A.

    full: fp32 weights under activations in `dtype`. lora: base in `dtype`. qlora: base in 4 bits, the rest in `dtype`.
    Raises ValueError for a 4-bit model under method full.
    """
    torch.manual_seed(flags.seed)
    if flags.method == "qlora" and takes_from_weight(flags.init):
        model = _load_in_4bit_with_adapter(flags)
    else:
        model = load_base(flags, flags.model)
        if flags.method != "full":
            add_adapter(model, flags.lora())
    model.gradient_checkpointing = flags.gradient_checkpointing
    return model


def _load_in_4bit_with_adapter(flags: TrainerFlags) -> Decoder:
    """A 4-bit base that keeps what the adapter's start leaves of the dense weights, which are loaded whole."""
    model = load_model(flags.model, dtype=_dtype(flags))
    add_adapter_in_4bit(
        model,
        flags.lora(),
        quant_type=flags.quant_type,
        blocksize=flags.blocksize,
        double_quant=flags.double_quant,
    )
    return model


def load_base(flags: TrainerFlags, source: str | Path) -> Decoder:
    """The model at `source`, without an adapter, in the precision that the method trains."""
    dtype = _dtype(flags)
    if flags.method == "full":
        model = load_model(source, dtype=torch.float32)
        if any(isinstance(module, LinearNF4) for module in model.modules()):
            raise ValueError(f"{source} is in 4 bits, which method full cannot train: take qlora, or a dense model")
        model.compute_dtype = dtype
        return model
    quantize = flags.quant_type if flags.method == "qlora" else None
    return load_model(
        source, dtype=dtype, quantize=quantize, blocksize=flags.blocksize, double_quant=flags.double_quant
    )


def _dtype(flags: TrainerFlags) -> torch.dtype:
    return torch.bfloat16 if flags.dtype == "bf16" else torch.float32


def frozen_base(flags: TrainerFlags) -> Decoder:
    """The model as it is before training, to compare with: nothing in it trains."""
    return load_base(flags, flags.model).requires_grad_(False).eval()


def load_trained(flags: TrainerFlags) -> Decoder:
    """What a finished run left in its folder: its model, or its base with its adapter."""
    out = Path(flags.out)
    if flags.method == "full":
        return load_base(flags, out / "model")
    model = load_base(flags, out / BASE if (out / BASE).is_dir() else flags.model)
    load_adapter(model, out / "adapter", trainable=True)
    return model
