"""From a trainer's flags to the model it trains, and back to the one a finished run left."""

from pathlib import Path

import torch

from lora import LinearNF4, add_adapter, load_adapter
from models import Decoder, load_model

from .flags import TrainerFlags


def prepare_model(flags: TrainerFlags) -> Decoder:
    """The base model as the method wants it, with its adapter if it has one. Seeds torch for the start of A.

    full: fp32 weights under activations in `dtype`. lora: base in `dtype`. qlora: base in 4 bits, the rest in `dtype`.
    Raises ValueError for a 4-bit model under method full.
    """
    torch.manual_seed(flags.seed)
    model = load_base(flags, flags.model)
    if flags.method != "full":
        add_adapter(model, flags.lora())
    model.gradient_checkpointing = flags.gradient_checkpointing
    return model


def load_base(flags: TrainerFlags, source: str | Path) -> Decoder:
    """The model at `source`, without an adapter, in the precision that the method trains."""
    dtype = torch.bfloat16 if flags.dtype == "bf16" else torch.float32
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


def load_trained(flags: TrainerFlags) -> Decoder:
    """What a finished run left in its folder: its model, or its base with its adapter."""
    out = Path(flags.out)
    if flags.method == "full":
        return load_base(flags, out / "model")
    model = load_base(flags, flags.model)
    load_adapter(model, out / "adapter", trainable=True)
    return model
