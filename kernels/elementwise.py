"""elementwise: RMSNorm, SwiGLU, rope and the sums of sampling in one pass over memory, where a kernel serves.

models/elementwise.py and models/sampling.py are the definition, in tensor operations. There each is a handful of passes
over memory, and a tensor of activations is larger than the caches. The C kernels (kernels/cpu/elementwise.h) read every
number once.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import asked_backend


class OnePass(NamedTuple):
    """The functions, of tensors of one dtype on the CPU; results are contiguous, rounded once from fp32."""

    rms_norm: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
    """(x (…, D), g (D,), ε) → y and ρ fp32 (…, 1)"""
    rms_norm_dx: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """(dy, x, g, ρ) → dx"""
    swiglu: Callable[[Tensor, Tensor], Tensor]
    """(gate, up) → y"""
    swiglu_dx: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(dy, gate, up) → d_gate and d_up"""
    rope: Callable[[Tensor, Tensor, Tensor, bool], Tensor]
    """(x (B, T, H, Dh), cos and sin fp32 (B or 1, T, 1, Dh/2), backwards) → x turned, or turned back"""
    softmax_blocks: Callable[[Tensor, float, int], tuple[Tensor, Tensor, Tensor]]
    """(logits fp32 (R, V), temperature, block) → largest and log_total (R, 1), each block's share (R, V / block)"""


def one_pass(*tensors: Tensor) -> OnePass | None:
    """What serves these tensors now, or None where the definition does."""
    if torch.compiler.is_compiling() or asked_backend() not in ("auto", "cpu"):
        return None
    from .cpu import elementwise  # the C kernels are a backend like any other: this file does not need them

    return elementwise.one_pass(*tensors)
