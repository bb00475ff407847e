"""adamw: the optimizer's step as backend "cpu": one pass over parameter, gradient and state.

What kernels/adamw.py defines, for fp32, bf16 and fp16 parameters and gradients with fp32 or 8-bit state. Results do not
depend on the number of threads, nor on where an element lies.
"""

import ctypes
import math
from ctypes import c_float
from typing import Any

import torch
from torch import Tensor

from ..adamw import AdamWStep
from ..dispatch import register
from .library import DTYPES, load, why_not
from .maps import map_8bit


class Step(ctypes.Structure):
    """adamw.h: adamw_step."""

    _fields_ = tuple((name, c_float) for name in ("decay", "take1", "keep2", "take2", "scale2", "eps", "rate"))


def _why_not_adamw(p: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: AdamWStep) -> str | None:
    return why_not(DTYPES, p, g) or why_not((torch.float32,), exp_avg, exp_avg_sq)


def _why_not_8bit(
    p: Tensor, g: Tensor, exp_avg: Tensor, absmax: Tensor, exp_avg_sq: Tensor, absmax_sq: Tensor, step: AdamWStep
) -> str | None:
    codes, scales = why_not((torch.uint8,), exp_avg, exp_avg_sq), why_not((torch.float32,), absmax, absmax_sq)
    return why_not(DTYPES, p, g) or codes or scales


@register("adamw", "cpu", unless=_why_not_adamw)
def adamw_cpu(p: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: AdamWStep) -> None:
    pointers = (p.data_ptr(), DTYPES[p.dtype], g.data_ptr(), DTYPES[g.dtype], exp_avg.data_ptr(), exp_avg_sq.data_ptr())
    load().adamw(*pointers, p.numel(), ctypes.byref(step_numbers(step)), _threads(step))


@register("adamw_8bit", "cpu", unless=_why_not_8bit)
def adamw_8bit_cpu(
    p: Tensor, g: Tensor, exp_avg: Tensor, absmax: Tensor, exp_avg_sq: Tensor, absmax_sq: Tensor, step: AdamWStep
) -> None:
    pointers = (p.data_ptr(), DTYPES[p.dtype], g.data_ptr(), DTYPES[g.dtype])
    state = (t.data_ptr() for t in (exp_avg, absmax, exp_avg_sq, absmax_sq))
    load().adamw_8bit(*pointers, *state, *state_maps(), p.numel(), ctypes.byref(step_numbers(step)), _threads(step))


def _threads(step: AdamWStep) -> int:
    return step.threads or torch.get_num_threads()


def step_numbers(step: AdamWStep) -> Step:
    """What C needs of a step."""
    return Step(
        decay=1 - step.lr * step.weight_decay,
        take1=1 - step.beta1,
        keep2=step.beta2,
        take2=1 - step.beta2,
        scale2=1 / math.sqrt(1 - step.beta2**step.t),
        eps=step.eps,
        rate=-step.lr / (1 - step.beta1**step.t),
    )


def state_maps() -> list[Any]:
    """Pointers to the maps of both moments, for C."""
    return [ctypes.byref(map_8bit(signed)) for signed in (True, False)]
