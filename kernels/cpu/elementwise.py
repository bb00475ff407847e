"""elementwise: RMSNorm, SwiGLU and rope in C (elementwise.h), for fp32 and bf16, and the softmax of the loss and of
sampling, for fp32."""

import ctypes
from ctypes import c_int64

import torch
from torch import Tensor

from ..buffers import empty, empty_like
from ..elementwise import OnePass
from .library import DTYPES, load, why_missing, why_not

SERVED = (torch.float32, torch.bfloat16)


class Heads(ctypes.Structure):
    """elementwise.h: heads."""

    _fields_ = tuple((name, c_int64) for name in ("B", "T", "H", "Dh", "batch", "token", "head"))


def one_pass(*tensors: Tensor) -> OnePass | None:
    """As kernels.elementwise.one_pass."""
    if why_missing() or why_not(SERVED, *tensors, strided=True) or any(t.dtype != tensors[0].dtype for t in tensors):
        return None
    return C


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, g = x.contiguous(), _gain(weight)
    y, rho = empty_like(x), torch.empty(*x.shape[:-1], 1)
    rows, D = rho.numel(), x.shape[-1]
    pointers = (y.data_ptr(), rho.data_ptr())
    load().rms_norm(x.data_ptr(), DTYPES[x.dtype], g.data_ptr(), eps, rows, D, *pointers, torch.get_num_threads())
    return y, rho


def rms_norm_dx(dy: Tensor, x: Tensor, weight: Tensor, rho: Tensor) -> Tensor:
    dy, x, g = dy.contiguous(), x.contiguous(), _gain(weight)
    dx = empty_like(x)
    inputs = (dy.data_ptr(), x.data_ptr(), DTYPES[x.dtype], g.data_ptr(), rho.data_ptr())
    load().rms_norm_dx(*inputs, rho.numel(), x.shape[-1], dx.data_ptr(), torch.get_num_threads())
    return dx


def _gain(weight: Tensor) -> Tensor:
    return weight.detach().float().contiguous()


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    y = empty_like(gate)
    inputs = (gate.data_ptr(), up.data_ptr(), DTYPES[gate.dtype], gate.numel())
    load().swiglu(*inputs, y.data_ptr(), torch.get_num_threads())
    return y


def swiglu_dx(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    d_gate, d_up = empty_like(gate), empty_like(up)
    inputs = (dy.data_ptr(), gate.data_ptr(), up.data_ptr(), DTYPES[gate.dtype], gate.numel())
    load().swiglu_dx(*inputs, d_gate.data_ptr(), d_up.data_ptr(), torch.get_num_threads())
    return d_gate, d_up


def rope(x: Tensor, cos: Tensor, sin: Tensor, backwards: bool) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    y = empty(x.shape, x.dtype)
    per_row = 0 if len(cos) == 1 else cos.stride(0)
    heads = Heads(*x.shape, *x.stride()[:3])
    angles = (cos.data_ptr(), sin.data_ptr(), per_row, -1 if backwards else 1)
    load().rope(x.data_ptr(), DTYPES[x.dtype], ctypes.byref(heads), *angles, y.data_ptr(), torch.get_num_threads())
    return y


def softmax_blocks(z: Tensor, temperature: float, block: int) -> tuple[Tensor, Tensor, Tensor]:
    z = z.contiguous()
    (R, V), threads = z.shape, torch.get_num_threads()
    largest, total, blocks = torch.empty(R, 1), torch.empty(R, 1), torch.empty(R, -(-V // block))
    outputs = (largest.data_ptr(), total.data_ptr(), blocks.data_ptr())
    load().softmax_blocks(z.data_ptr(), R, V, 1 / temperature, block, *outputs, threads)
    return largest, total, blocks


C = OnePass(rms_norm, rms_norm_dx, swiglu, swiglu_dx, rope, softmax_blocks)


def serves_softmax(z: Tensor) -> bool:
    """Whether running_softmax takes z."""
    return why_missing() is None and why_not((torch.float32,), z) is None


def running_softmax(
    z: Tensor,
    temperature: float,
    targets: Tensor,
    first: int,
    m: Tensor,
    at_target: Tensor,
    total: Tensor,
    mixed: Tensor | None,
    slope: Tensor | None,
) -> None:
    """vocabulary_tiles.RunningSoftmax.take; all but z and targets are changed in place."""
    sums = (m.data_ptr(), at_target.data_ptr(), total.data_ptr(), None if mixed is None else mixed.data_ptr())
    scaled = (None, 0) if slope is None else (slope.data_ptr(), slope.shape[1])
    words = (targets.data_ptr(), first)
    load().running_softmax(z.data_ptr(), *z.shape, 1 / temperature, *words, *sums, *scaled, torch.get_num_threads())
