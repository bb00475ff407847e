"""attention: causal attention of documents in C (attention.h), for fp32."""

import ctypes
from ctypes import c_int, c_int64, c_void_p
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..buffers import empty, empty_like
from .library import load, why_missing, why_not, workspace

WIDTH, WIDEST = 32, 288  # head sizes served: multiples of a panel, up to what a tile holds


class CAttention(ctypes.Structure):
    """attention.h: attention."""

    _fields_ = (
        *((name, c_int64) for name in ("n", "H", "Kv", "Dh")),
        *((name, c_void_p) for name in ("documents", "q", "k", "v", "y", "lse", "workspace")),
        *((name, c_void_p) for name in ("dy", "dq", "dk", "dv", "sums")),
        ("threads", c_int),
    )


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether causal_attention takes these."""
    Dh = q.shape[3]
    fits = k.shape == v.shape and k.shape[:2] == q.shape[:2] and Dh % WIDTH == 0 and Dh <= WIDEST
    return fits and not (why_missing() or why_not((torch.float32,), q, k, v, strided=True))


class Documents(NamedTuple):
    """Who attends to whom, as C reads it."""

    table: Tensor
    """attention.h: document, of each: int64 (n, 5)"""
    tokens: int
    """of all of them: those of B · T that are not padding"""
    prefix_tokens: int
    """of all their prefixes, one that several continue counted for each"""


@lru_cache(maxsize=8)  # every layer asks for the same
def documents(
    B: int, T: int, runs: tuple[tuple[int, int, int], ...] | None, prefixes: tuple[int | None, ...] | None
) -> Documents:
    """Of runs and prefixes as kernels.attention.causal_attention takes them. Those with most to do come first."""
    runs = tuple((row, 0, T) for row in range(B)) if runs is None else runs
    found = []
    for (row, start, stop), prefix in zip(runs, prefixes or [None] * len(runs), strict=True):
        _, first, end = (0, 0, 0) if prefix is None else runs[prefix]
        found.append((row * T + start, stop - start, row * T + first, end - first))
    found.sort(key=lambda d: d[1] * (d[1] + 2 * d[3]), reverse=True)  # pairs of a query and a key
    before = [0, *accumulate(d[3] for d in found)]
    table = torch.tensor([(*d, sums) for d, sums in zip(found, before[:-1], strict=True)], dtype=torch.int64)
    return Documents(table, sum(d[1] for d in found), before[-1])


class CausalAttention(torch.autograd.Function):
    """q (B, T, H, Dh), k and v (B, T, Kv, Dh) → (B, T, H, Dh): kernels.attention.causal_attention."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, docs: Documents) -> Tensor:
        q, k, v = (t.contiguous() for t in (q, k, v))
        y, lse = _output(q, docs), torch.empty(q.shape[:3])
        _call("attention", False, docs, q, k, v, y=y, lse=lse)
        ctx.save_for_backward(q, k, v, y, lse)
        ctx.docs = docs
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, y, lse = ctx.saved_tensors
        dq, dk, dv = (_output(t, ctx.docs) for t in (q, k, v))
        sums = empty((ctx.docs.prefix_tokens, 2, *k.shape[2:]), k.dtype)
        _call("attention_dx", True, ctx.docs, q, k, v, y=y, lse=lse, dy=dy.contiguous(), dq=dq, dk=dk, dv=dv, sums=sums)
        return dq, dk, dv, None


def _output(x: Tensor, docs: Documents) -> Tensor:
    """Like x; zeros where there is padding between the documents."""
    y = empty_like(x)
    return y if docs.tokens == x.shape[0] * x.shape[1] else y.zero_()


def _call(name: str, backward: bool, docs: Documents, q: Tensor, k: Tensor, v: Tensor, **tensors: Tensor) -> None:
    H, Dh = q.shape[2:]
    named = {"documents": docs.table, "q": q, "k": k, "v": v} | tensors
    pointers = {key: t.data_ptr() for key, t in named.items()}
    call = CAttention(n=len(docs.table), H=H, Kv=k.shape[2], Dh=Dh, threads=torch.get_num_threads(), **pointers)
    lib = load()
    scratch = workspace(lib.attention_floats(ctypes.byref(call), backward))
    call.workspace = scratch.data_ptr()
    getattr(lib, name)(ctypes.byref(call))
