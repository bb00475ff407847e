"""attention: causal attention over whole rows in C (attention.h), for fp32."""

import ctypes
from ctypes import c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from ..buffers import empty, empty_like
from .library import load, why_missing, why_not, workspace

WIDTH, WIDEST = 32, 288  # head sizes served: multiples of a panel, up to what a tile holds


class CAttention(ctypes.Structure):
    """attention.h: attention."""

    _fields_ = (
        *((name, c_int64) for name in ("B", "T", "H", "Kv", "Dh")),
        *((name, c_void_p) for name in ("q", "k", "v", "y", "lse", "workspace", "dy", "dq", "dk", "dv")),
        ("threads", c_int),
    )


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether causal_attention takes these. Below two tasks a thread, or in short rows, torch's is as good."""
    B, T, _, Dh = q.shape
    fits = k.shape == v.shape and k.shape[:2] == q.shape[:2] and Dh % WIDTH == 0 and Dh <= WIDEST
    enough = B * k.shape[2] >= 2 * torch.get_num_threads() and T >= WIDTH
    return fits and enough and not (why_missing() or why_not((torch.float32,), q, k, v, strided=True))


class CausalAttention(torch.autograd.Function):
    """q (B, T, H, Dh), k and v (B, T, Kv, Dh) → (B, T, H, Dh): kernels.attention.causal_attention."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.contiguous() for t in (q, k, v))
        y, lse = empty_like(q), torch.empty(q.shape[0], q.shape[2], q.shape[1])
        _call("attention", False, q, k, v, y=y, lse=lse)
        ctx.save_for_backward(q, k, v, y, lse)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, y, lse = ctx.saved_tensors
        dq, dk, dv = (empty(t.shape, t.dtype) for t in (q, k, v))
        _call("attention_dx", True, q, k, v, y=y, lse=lse, dy=dy.contiguous(), dq=dq, dk=dk, dv=dv)
        return dq, dk, dv


def _call(name: str, backward: bool, q: Tensor, k: Tensor, v: Tensor, **tensors: Tensor) -> None:
    B, T, H, Dh = q.shape
    pointers = {key: t.data_ptr() for key, t in ({"q": q, "k": k, "v": v} | tensors).items()}
    call = CAttention(B=B, T=T, H=H, Kv=k.shape[2], Dh=Dh, threads=torch.get_num_threads(), **pointers)
    lib = load()
    scratch = workspace(lib.attention_floats(ctypes.byref(call), backward))
    call.workspace = scratch.data_ptr()
    getattr(lib, name)(ctypes.byref(call))
