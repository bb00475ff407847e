"""What every launcher needs: may this tensor go to a kernel, which lookup fits, and a weight as kernel arguments."""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton
from torch import Tensor

from quant import QuantizedTensor
from quant.codebook import codebook

from .lookup import Levels, scaled_asm

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
EXACT = {"enable_fp_fusion": False}
"""Launch option: a product and a sum round apart, as they do in the reference."""


def interpreted() -> bool:
    """Do kernels run in Triton's interpreter (TRITON_INTERPRET=1 when triton was first imported)?"""
    return bool(triton.knobs.runtime.interpret)


def why_missing() -> str | None:
    """Why no kernel can run in this process, or None."""
    if interpreted() or torch.cuda.is_available():
        return None
    return "no GPU here, and TRITON_INTERPRET=1 was not in the environment before triton was imported"


def describe() -> str:
    """Where kernels run: for describe_backends."""
    return "in Triton's interpreter" if interpreted() else torch.cuda.get_device_name()


def check_device(operation: str, tensor: Tensor) -> None:
    """Raises ValueError where Triton can run nothing: a CPU tensor outside the interpreter."""
    if tensor.device.type == "cpu" and not interpreted():
        raise ValueError(
            f"backend 'triton' was asked for and cannot run {operation} on a CPU tensor: it needs a GPU, or "
            "TRITON_INTERPRET=1 in the environment before triton is imported"
        )


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current GPU: inside, that is the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def capability(device: torch.device) -> int | None:
    """80 for sm_80; None for AMD and for the interpreter, where there is no PTX."""
    if device.type != "cuda" or torch.version.hip or interpreted():
        return None
    return _capability(device)


@lru_cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache
def levels_of(quant_type: str) -> Levels:
    """The code book as Python numbers, without reading it back from the GPU."""
    return tuple(codebook(quant_type).tolist())


def scaled_lookup(q: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> str | None:
    """The PTX for products in `dtype`, or None for the exact gather."""
    if capability(device) is None or dtype == torch.float32:
        return None
    return scaled_asm(levels_of(q.quant_type), dtype)


def weight_arguments(q: QuantizedTensor) -> tuple[Tensor, ...]:
    """packed, code, absmax (8-bit or fp32), absmax_code, absmax2, absmax_offset. Unused ones repeat absmax."""
    if q.absmax_8bit is None:
        absmax = q.scales()
        return q.packed, q.code, absmax, absmax, absmax, absmax
    parts = q.tensors()
    names = ("packed", "code", "absmax_8bit", "absmax_code", "absmax2", "absmax_offset")
    return tuple(parts[name] for name in names)
