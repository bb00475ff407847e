"""attention: causal attention of documents in C (attention.h), in fp32: bf16 is widened before and rounded after."""

import ctypes
from ctypes import c_int, c_int64, c_void_p
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..buffers import empty, empty_like
from .library import load, why_missing, why_not, workspace
from .operations import PRODUCT_DTYPES

WIDTH, WIDEST = 32, 288  # head sizes served: multiples of a panel, up to what a tile holds
SHORT = 32  # tokens
PIECE, MOST_PIECES = 256, 4  # a document is cut, so that threads share it, into no smaller pieces and no more

Runs = tuple[tuple[int, int, int], ...] | None
Prefixes = tuple[int | None, ...] | None


class CAttention(ctypes.Structure):
    """attention.h: attention."""

    _fields_ = (
        *((name, c_int64) for name in ("n", "H", "Kv", "Dh")),
        *((name, c_void_p) for name in ("pieces", "q", "k", "v", "y", "lse", "workspace")),
        *((name, c_void_p) for name in ("dy", "dq", "dk", "dv", "sums")),
        ("threads", c_int),
    )


def serves(q: Tensor, k: Tensor, v: Tensor, runs: Runs, prefixes: Prefixes) -> bool:
    """Whether causal_attention takes these. Torch's is as good for short rows of one document each, and better where C
    would leave more than half of the threads without a task."""
    B, T, _, Dh = q.shape
    same = q.dtype == k.dtype == v.dtype
    fits = same and k.shape == v.shape and k.shape[:2] == q.shape[:2] and Dh % WIDTH == 0 and Dh <= WIDEST
    if not fits or why_missing() or why_not(PRODUCT_DTYPES, q, k, v, strided=True):
        return False
    tasks = len(cut(B, T, runs, prefixes).table) * k.shape[2]
    return (runs is not None or T >= SHORT) and 2 * tasks >= torch.get_num_threads()


class Pieces(NamedTuple):
    """The documents, cut, as C reads them."""

    table: Tensor
    """attention.h: piece, of each: int64 (n, 6)"""
    tokens: int
    """of all of them: those of B · T that are not padding"""
    earlier_keys: int
    """keys before their own, of all of them"""


@lru_cache(maxsize=8)  # every layer asks for the same
def cut(B: int, T: int, runs: Runs, prefixes: Prefixes) -> Pieces:
    """Of runs and prefixes as kernels.attention.causal_attention takes them. Those with most to do come first."""
    runs = tuple((row, 0, T) for row in range(B)) if runs is None else runs
    found = []
    for (row, start, stop), number in zip(runs, prefixes or [None] * len(runs), strict=True):
        prefix_row, first, end = (0, 0, 0) if number is None else runs[number]
        length = stop - start
        size = -(-length // min(max(length // PIECE, 1), MOST_PIECES))
        for before in range(0, length, size):
            found.append((prefix_row * T + first, end - first, row * T + start, before, min(size, length - before)))
    found.sort(key=lambda p: p[4] * (2 * (p[1] + p[3]) + p[4]), reverse=True)  # twice the pairs of a query and a key
    sums = [0, *accumulate(p[1] + p[3] for p in found)]
    rows = [(*p, at) for p, at in zip(found, sums[:-1], strict=True)]
    return Pieces(torch.tensor(rows, dtype=torch.int64, device="cpu"), sum(p[4] for p in found), sums[-1])


class CausalAttention(torch.autograd.Function):
    """q (B, T, H, Dh), k and v (B, T, Kv, Dh) → (B, T, H, Dh): kernels.attention.causal_attention."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pieces: Pieces) -> Tensor:
        q, k, v = (t.contiguous() for t in (q, k, v))
        y, lse = _output(q, pieces), torch.empty(q.shape[:3])
        _call("attention", False, pieces, *map(_wide, (q, k, v)), y=y, lse=lse)
        y = _as(y, q.dtype)
        ctx.save_for_backward(q, k, v, y, lse)
        ctx.pieces = pieces
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, lse = ctx.saved_tensors
        q, k, v, y = map(_wide, inputs)
        dq, dk, dv = (_output(t, ctx.pieces) for t in (q, k, v))
        sums = empty((ctx.pieces.earlier_keys, 2, *k.shape[2:]), k.dtype)
        dy = _wide(dy.contiguous())
        _call("attention_dx", True, ctx.pieces, q, k, v, y=y, lse=lse, dy=dy, dq=dq, dk=dk, dv=dv, sums=sums)
        return *(_as(t, inputs[0].dtype) for t in (dq, dk, dv)), None


def _wide(x: Tensor) -> Tensor:
    return _as(x, torch.float32)


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else empty_like(x, dtype).copy_(x)


def _output(x: Tensor, pieces: Pieces) -> Tensor:
    """Like x, in fp32; zeros where there is padding between the documents."""
    y = empty_like(x, torch.float32)
    return y if pieces.tokens == x.shape[0] * x.shape[1] else y.zero_()


def _call(name: str, backward: bool, pieces: Pieces, q: Tensor, k: Tensor, v: Tensor, **tensors: Tensor) -> None:
    H, Dh = q.shape[2:]
    named = {"pieces": pieces.table, "q": q, "k": k, "v": v} | tensors
    pointers = {key: t.data_ptr() for key, t in named.items()}
    call = CAttention(n=len(pieces.table), H=H, Kv=k.shape[2], Dh=Dh, threads=torch.get_num_threads(), **pointers)
    lib = load()
    scratch = workspace(lib.attention_floats(ctypes.byref(call), backward))
    call.workspace = scratch.data_ptr()
    getattr(lib, name)(ctypes.byref(call))
