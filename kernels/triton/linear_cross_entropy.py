"""linear_cross_entropy on a GPU: the logits live a tile at a time, in registers.

    z   = x · Wᵀ / τ            nll = (max z - z_target) + log Σ_v exp(z_v - max z)            forward, online over v
    dz  = dnll / τ · (exp(z - max z - log Σ) - onehot)        dx = dz · W        dW = dzᵀ · x        backward

    M rows, D hidden size, V vocabulary, τ temperature; W (V, D) dense in any dtype, or 4-bit codes

Forward: a program takes BM rows and a part of the vocabulary, and keeps the largest logit, the sum of exponentials
relative to it, and the target's logit; the parts are put together in order. max and log Σ stay apart: their sum minus
z_target would lose digits. Backward computes the tiles again, a chunk of rows at a time (40 MiB of dz in x.dtype), and
multiplies. Logits are fp32 and never rounded to x.dtype, so nll is nearer to the float64 result than the reference's.

Equals kernels/linear_cross_entropy.py's reference within that accuracy. Left to the reference, which runs its products
on these kernels: softcap, entropy, a bias or adapters of the head, a GPU whose tensor cores Triton cannot use.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant import QuantizedTensor

from ..dispatch import captured_backend, register
from ..linear_cross_entropy import CHUNK_BYTES, Head, linear_cross_entropy_reference
from . import matmul
from .launch import EXACT, FLOATS, capability, check_device, interpreted, on_device_of, scaled_lookup, weight_arguments
from .lookup import add_product, block_scales, rounded, scaled_tile

TILE = {"BM": 64, "BV": 128, "BK": 64, "num_warps": 4, "num_stages": 3}


@triton.jit
def _logits(
    x, row, v, weight, code, absmax, absmax_code, absmax2, absmax_offset, over_temperature, V,
    D: tl.constexpr, BLOCKSIZE: tl.constexpr, DOUBLE: tl.constexpr, QUANTIZED: tl.constexpr, ASM: tl.constexpr,
    BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """fp32 (BM, BV): logits of rows `row` at words `v`, -inf past the end of the vocabulary."""
    dtype: tl.constexpr = x.dtype.element_ty
    word = tl.minimum(v, V - 1)
    acc = tl.zeros((BM, BV), tl.float32)
    for step in range(0, tl.cdiv(D, BK)):
        k = step * BK + tl.arange(0, BK)
        if QUANTIZED:
            byte = step * (BK // 2) + tl.arange(0, BK // 2)
            codes = tl.load(weight + word.to(tl.int64)[:, None] * (D // 2) + byte[None, :])
            block = word * (D // BLOCKSIZE) + step // (BLOCKSIZE // BK)
            scale = block_scales(block, absmax, absmax_code, absmax2, absmax_offset, DOUBLE)
            w = scaled_tile(codes, scale, code, dtype, ASM)
        else:
            stored = tl.load(weight + word.to(tl.int64)[:, None] * D + k[None, :], (k < D)[None, :], other=0.0)
            w = rounded(stored.to(tl.float32), dtype)
        tile = tl.load(x + row.to(tl.int64)[:, None] * D + k[None, :], (k < D)[None, :], other=0.0)
        acc = add_product(tile, tl.trans(w), acc)
    return tl.where((v < V)[None, :], acc * over_temperature, float("-inf"))


@triton.jit
def forward_kernel(
    x, weight, code, absmax, absmax_code, absmax2, absmax_offset, targets, largest, total, at_target,
    over_temperature, M, V, part_size,
    D: tl.constexpr, BLOCKSIZE: tl.constexpr, DOUBLE: tl.constexpr, QUANTIZED: tl.constexpr, ASM: tl.constexpr,
    BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """largest, total, at_target fp32 (parts, M), of this part's words: max z, Σ exp(z - max z), z_target or 0."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    row = tl.minimum(m, M - 1)
    part = tl.program_id(1)
    target = tl.load(targets + row)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total_here = tl.zeros((BM,), tl.float32)
    z_target = tl.zeros((BM,), tl.float32)
    for first in range(part * part_size, tl.minimum((part + 1) * part_size, V), BV):
        v = first + tl.arange(0, BV)
        z = _logits(
            x, row, v, weight, code, absmax, absmax_code, absmax2, absmax_offset, over_temperature, V,
            D, BLOCKSIZE, DOUBLE, QUANTIZED, ASM, BM, BV, BK,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(z, axis=1))
        total_here = total_here * tl.exp(top - higher) + tl.sum(tl.exp(z - higher[:, None]), axis=1)
        top = higher
        z_target += tl.sum(tl.where(v[None, :] == target[:, None], z, 0.0), axis=1)
    out = part * M + m
    tl.store(largest + out, top, m < M)
    tl.store(total + out, total_here, m < M)
    tl.store(at_target + out, z_target, m < M)


@triton.jit
def dz_kernel(
    x, weight, code, absmax, absmax_code, absmax2, absmax_offset, targets, largest, log_total, dnll, dz,
    over_temperature, M, V,
    D: tl.constexpr, BLOCKSIZE: tl.constexpr, DOUBLE: tl.constexpr, QUANTIZED: tl.constexpr, ASM: tl.constexpr,
    BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dz (M, V) in x.dtype, of the logits before the temperature."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    v = tl.program_id(1) * BV + tl.arange(0, BV)
    row = tl.minimum(m, M - 1)
    z = _logits(
        x, row, v, weight, code, absmax, absmax_code, absmax2, absmax_offset, over_temperature, V,
        D, BLOCKSIZE, DOUBLE, QUANTIZED, ASM, BM, BV, BK,
    )  # fmt: skip
    p = tl.exp((z - tl.load(largest + row)[:, None]) - tl.load(log_total + row)[:, None])
    p -= (v[None, :] == tl.load(targets + row)[:, None]).to(tl.float32)
    value = p * (tl.load(dnll + row) * over_temperature)[:, None]
    at = m.to(tl.int64)[:, None] * V + v[None, :]
    tl.store(dz + at, rounded(value, dz.dtype.element_ty), (m < M)[:, None] & (v < V)[None, :])


@register("linear_cross_entropy", "triton")
def linear_cross_entropy_triton(
    hidden: Tensor, head: Head, targets: Tensor, temperature: float, softcap: float | None, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    """(nll, entropy), fp32 (M,)."""
    check_device("linear_cross_entropy", hidden)
    composed = softcap is not None or with_entropy or head.bias is not None or bool(head.adapters)
    if composed or not len(targets) or why_unserved(head.weight, hidden) is not None:
        return linear_cross_entropy_reference(hidden, head, targets, temperature, softcap, with_entropy)
    dense, q = (head.weight, None) if isinstance(head.weight, Tensor) else (None, head.weight)
    nll = _FusedLinearCrossEntropy.apply(hidden, dense, q, targets, temperature)
    return nll, torch.zeros_like(nll)


def why_unserved(weight: Tensor | QuantizedTensor, hidden: Tensor) -> str | None:
    """Why the reference runs a head of this kind, or None."""
    if isinstance(weight, QuantizedTensor):
        return matmul.why_unserved(weight, hidden.dtype, hidden.device)
    if hidden.dtype not in FLOATS or weight.dtype not in FLOATS:
        return f"hidden states are {hidden.dtype} and the head is {weight.dtype}"
    return matmul.why_no_tensor_cores(hidden.device)


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """The weight is `dense` or `q`; the other is None. autograd sees only a function's tensor arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        dense: Tensor | None,
        q: QuantizedTensor | None,
        targets: Tensor,
        temperature: float,
    ) -> Tensor:
        hidden = hidden.contiguous()
        weight = dense if q is None else q
        assert weight is not None
        largest, log_total, at_target = _forward(hidden, weight, targets, temperature)
        ctx.save_for_backward(hidden, dense, targets, largest, log_total)
        ctx.q, ctx.temperature, ctx.backend = q, temperature, captured_backend()
        return (largest - at_target) + log_total

    @staticmethod
    def backward(ctx: Any, dnll: Tensor) -> tuple[Tensor | None, ...]:
        hidden, dense, targets, largest, log_total = ctx.saved_tensors
        weight = dense if ctx.q is None else ctx.q
        V = weight.shape[0]
        dx = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dw = torch.zeros(dense.shape, dtype=torch.float32, device=hidden.device) if ctx.needs_input_grad[1] else None
        step = max(1, CHUNK_BYTES // (hidden.element_size() * V))
        for start in range(0, len(targets), step):
            rows = slice(start, start + step)
            stats = (targets[rows], largest[rows], log_total[rows], dnll[rows].contiguous())
            dz = _dz(hidden[rows], weight, ctx.temperature, *stats)
            if dx is not None:
                with ctx.backend():
                    dx[rows] = dz @ dense.to(dz.dtype) if ctx.q is None else matmul.backward(dz, ctx.q)
            if dw is not None:
                dw += (dz.T @ hidden[rows]).float()
        return dx, None if dw is None else dw.to(dense.dtype), None, None, None


def _forward(
    hidden: Tensor, weight: Tensor | QuantizedTensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """max z, log Σ exp(z - max z) and z_target, fp32 (M,)."""
    M, V = len(targets), weight.shape[0]
    options = _options(hidden, weight)
    tiles_m, tiles_v = triton.cdiv(M, options["BM"]), triton.cdiv(V, options["BV"])
    parts = max(1, min(tiles_v, 2 * matmul.multiprocessors(hidden.device) // tiles_m))
    part_size = triton.cdiv(tiles_v, parts) * options["BV"]
    parts = triton.cdiv(V, part_size)
    largest, total, at_target = torch.empty(3, parts, M, dtype=torch.float32, device=hidden.device)
    arguments = (hidden, *_arguments(weight), targets, largest, total, at_target, 1 / temperature, M, V, part_size)
    with on_device_of(hidden):
        forward_kernel[(tiles_m, parts)](*arguments, **options)
    top = largest.amax(dim=0)
    return top, (total * (largest - top).exp()).sum(dim=0).log(), at_target.sum(dim=0)


def _dz(
    hidden: Tensor,
    weight: Tensor | QuantizedTensor,
    temperature: float,
    targets: Tensor,
    largest: Tensor,
    log_total: Tensor,
    dnll: Tensor,
) -> Tensor:
    M, V = len(targets), weight.shape[0]
    options = _options(hidden, weight)
    dz = torch.empty(M, V, dtype=hidden.dtype, device=hidden.device)
    arguments = (hidden, *_arguments(weight), targets, largest, log_total, dnll, dz, 1 / temperature, M, V)
    with on_device_of(hidden):
        dz_kernel[(triton.cdiv(M, options["BM"]), triton.cdiv(V, options["BV"]))](*arguments, **options)
    return dz


def _arguments(weight: Tensor | QuantizedTensor) -> tuple[Tensor, ...]:
    return weight_arguments(weight) if isinstance(weight, QuantizedTensor) else (weight.contiguous(),) * 6


def _options(hidden: Tensor, weight: Tensor | QuantizedTensor) -> dict[str, Any]:
    q = weight if isinstance(weight, QuantizedTensor) else None
    block = q.blocksize if q is not None else 64
    return {
        "D": hidden.shape[1],
        "BLOCKSIZE": block,
        "DOUBLE": q is not None and q.double_quant,
        "QUANTIZED": q is not None,
        "ASM": None if q is None else scaled_lookup(q, hidden.dtype, hidden.device),
        **tile(hidden, block),
        **EXACT,
    }


def tile(hidden: Tensor, blocksize: int) -> dict[str, int]:
    """Rows, words and columns of a program. fp32 has no tensor cores here, and AMD little shared memory."""
    if interpreted():
        return {"BM": 16, "BV": 32, "BK": 32}
    if hidden.dtype == torch.float32:
        return {"BM": 16, "BV": 32, "BK": 32, "num_warps": 4, "num_stages": 2}
    stages = 1 if capability(hidden.device) is None else 3
    short = {"BM": 32, "BK": 32} if blocksize < 64 else {}  # configs.py: BK = 32 takes mma
    return TILE | {"num_stages": stages} | short
