"""lora_matmul: a frozen base, dense or quantized, with low-rank terms beside it.

LoRA, arXiv 2106.09685, eq. 3; QLoRA, arXiv 2305.14314, eq. 5.

    forward    y  = c ⊙ (x · Wᵀ + Σ_i s_i · (x_i · A_iᵀ) · B_iᵀ) + b
    backward   dx = (c ⊙ dy) · W + Σ_i s_i · ((c ⊙ dy) · B_i) · A_i          (the term where x_i is x)
               dA_i = s_i · ((c ⊙ dy) · B_i)ᵀ · x_i        dB_i = s_i · (c ⊙ dy)ᵀ · (x_i · A_iᵀ)

    W (N, K), A_i (r, K), B_i (N, r), s_i scaling; c (N,) is 1, or DoRA's m / ‖W + s·BA‖ by row; b (N,)

The terms are further columns of the same product: with L = [x_1 A_1ᵀ …] (M, Σr) and U = [s_1 B_1 …] (N, Σr),

    y  = x · Wᵀ + L · Uᵀ + b = [x L] · [W U]ᵀ + b
    dx = dy · W + G · [A_1; …]        G = dy · U, dA_i = G_iᵀ · x_i, dB_i = s_i · dyᵀ · L_i

so they are added in the accumulator, and y is rounded once. In bf16 that is more than speed: y + s·(xAᵀ)Bᵀ, added after
y was rounded, loses every update that is smaller than half of y's last bit, which is most of them when training starts.
Twenty LoRA steps of SmolLM2 so lagged by up to 0.15 nats behind fp32; rounded once, by 0.012 (docs/log.md).

Saved for backward: x, each x_i of its own, A_i, B_i, L_i, and a dense W. Never Ŵ = dequantize(q).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from quant import QuantizedTensor

from . import ops
from .dequantize import dequantize
from .dispatch import backend_for, captured_backend, implementation, register
from .matmul import check_length, linear, matmul, sum_rows


class LoRATerm(NamedTuple):
    """One adapter's s · (x Aᵀ) Bᵀ."""

    A: Tensor
    """(r, K)"""
    B: Tensor
    """(N, r)"""
    scaling: float
    """alpha / r, or alpha / √r with rsLoRA"""
    x: Tensor | None = None
    """(…, K): the adapter's own input where it differs from the base's, which dropout makes it do"""


def lora_matmul(
    x: Tensor,
    base: Tensor | QuantizedTensor,
    adapters: Sequence[LoRATerm],
    *,
    bias: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """x (…, K) → (…, N) in x.dtype. Differentiable in x, every A and B, bias, row_scale, and a dense base.

    A and B are cast to x.dtype; their gradients come in their own dtype. Raises ValueError when a shape does not fit.
    """
    N, K = base.shape
    if x.shape[-1] != K:
        raise ValueError(f"lora_matmul needs x (…, {K}) for a base of {(N, K)}, got {tuple(x.shape)}")
    for term in adapters:
        if term.A.shape[1] != K or term.B.shape[0] != N or term.A.shape[0] != term.B.shape[1]:
            raise ValueError(
                f"an adapter of a base {(N, K)} needs A (r, {K}) and B ({N}, r), "
                f"got A {tuple(term.A.shape)} and B {tuple(term.B.shape)}"
            )
        if term.x is not None and term.x.shape != x.shape:
            raise ValueError(f"an adapter's own x must be of x's shape, {tuple(x.shape)}, got {tuple(term.x.shape)}")
    check_length("bias", bias, N)
    check_length("row_scale", row_scale, N)
    if torch.compiler.is_compiling():
        return compiled(x, base, adapters, bias, row_scale)
    run = implementation("lora_matmul", backend_for("lora_matmul", x.device))
    return run(x, base, adapters, bias, row_scale)


def narrow(x: Tensor, A: Tensor) -> Tensor:
    """x (M, K) · Aᵀ → (M, r), A (r, K)."""
    return x @ A.T


def outer(h: Tensor, x: Tensor) -> Tensor:
    """hᵀ · x → (r, K), h (M, r), x (M, K): the outer products of their rows, summed. In their dtype or a wider one."""
    return h.T @ x


class Products(NamedTuple):
    """What a backend brings: the two products with low-rank terms in them. low and up are None without terms."""

    forward: Callable[[Tensor, Any, Tensor | None, Tensor | None, Tensor | None], Tensor]
    """(x (…, K), base (N, K), bias, low (M, Σr), up (N, Σr)) → x · Wᵀ + low · upᵀ + bias"""
    backward: Callable[[Tensor, Any, Tensor | None, Tensor | None], Tensor]
    """(dy (…, N), base (N, K), low (M, Σr), up (Σr, K)) → dy · W + low · up"""
    narrow: Callable[[Tensor, Tensor], Tensor] = narrow
    outer: Callable[[Tensor, Tensor], Tensor] = outer


@register("lora_matmul", "reference")
def lora_matmul_reference(
    x: Tensor,
    base: Tensor | QuantizedTensor,
    adapters: Sequence[LoRATerm],
    bias: Tensor | None,
    row_scale: Tensor | None,
) -> Tensor:
    return composed(REFERENCE, x, base, adapters, bias, row_scale)


def composed(
    products: Products,
    x: Tensor,
    base: Tensor | QuantizedTensor,
    adapters: Sequence[LoRATerm],
    bias: Tensor | None,
    row_scale: Tensor | None,
) -> Tensor:
    """lora_matmul from a backend's two products; the row scale is applied to what they give."""
    inner_bias = bias if row_scale is None else None
    if adapters:
        scalings = tuple(term.scaling for term in adapters)
        inputs = [t for term in adapters for t in (term.A, term.B, term.x)]
        y = _LoRAMatmul.apply(products, scalings, x, base, inner_bias, *inputs)
    else:
        y = matmul(x, base, inner_bias) if isinstance(base, QuantizedTensor) else linear(x, base, inner_bias)
    return y if row_scale is None else _row_scaled(y, row_scale, bias)


def _row_scaled(y: Tensor, row_scale: Tensor, bias: Tensor | None) -> Tensor:
    y = y * row_scale.to(y.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def compiled(
    x: Tensor,
    base: Tensor | QuantizedTensor,
    adapters: Sequence[LoRATerm],
    bias: Tensor | None,
    row_scale: Tensor | None,
) -> Tensor:
    """What torch.compile traces: plain tensor operations around one operator (ops.py)."""
    inner_bias = bias if row_scale is None else None
    low = up = None
    if adapters:
        inputs = [x if term.x is None else term.x for term in adapters]
        lows = [_rows(x_i) @ term.A.to(x.dtype).T for x_i, term in zip(inputs, adapters, strict=True)]
        scalings, Bs = [term.scaling for term in adapters], [term.B for term in adapters]
        low, up = torch.cat(lows, 1), torch.cat(_scaled(scalings, Bs, x.dtype), 1)
    if isinstance(base, QuantizedTensor):
        y = ops.matmul(x, base, inner_bias, low, up)
    else:
        y = low_rank_product(x, base.to(x.dtype), inner_bias, low, up)
    return y if row_scale is None else _row_scaled(y, row_scale, bias)


class _LoRAMatmul(torch.autograd.Function):
    """After the bias: A, B and own input (or None) of each term."""

    @staticmethod
    def forward(
        ctx: Any,
        products: Products,
        scalings: tuple[float, ...],
        x: Tensor,
        base: Tensor | QuantizedTensor,
        bias: Tensor | None,
        *terms: Tensor | None,
    ) -> Tensor:
        As, Bs, own = terms[0::3], terms[1::3], terms[2::3]
        inputs = [_rows(x if x_i is None else x_i) for x_i in own]
        lows = [products.narrow(x_i, A.to(x.dtype)) for A, x_i in zip(As, inputs, strict=True)]  # type: ignore[union-attr]
        ctx.products, ctx.scalings, ctx.backend = products, scalings, captured_backend()
        ctx.q = base if isinstance(base, QuantizedTensor) else None
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, None if ctx.q is not None else base, *terms, *lows)
        return products.forward(x, base, bias, _cat(lows, 1), _cat(_scaled(scalings, Bs, x.dtype), 1))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, dense, *rest = ctx.saved_tensors
        n = len(ctx.scalings)
        terms, lows = rest[: 3 * n], rest[3 * n :]
        As, Bs, own = terms[0::3], terms[1::3], terms[2::3]
        _, _, wants_x, wants_base, wants_bias, *wants = ctx.needs_input_grad
        dy = dy.contiguous()  # attention's gradients are not, and each of its users would copy it
        dy_rows = _rows(dy)
        narrow, outer = ctx.products.narrow, ctx.products.outer
        highs = [narrow(dy_rows, sB.T.contiguous()) for sB in _scaled(ctx.scalings, Bs, dy.dtype)]

        grads: list[Tensor | None] = []
        for i, (s, A, B, x_i) in enumerate(zip(ctx.scalings, As, Bs, own, strict=True)):
            wants_A, wants_B, wants_own = wants[3 * i : 3 * i + 3]
            grads.append(outer(highs[i], _rows(x if x_i is None else x_i)).to(A.dtype) if wants_A else None)
            grads.append(outer(lows[i], dy_rows).T.to(B.dtype).mul(s) if wants_B else None)
            grads.append((highs[i] @ A.to(dy.dtype)).view_as(x_i) if wants_own else None)

        dx = d_base = None
        if wants_x:
            shared = [i for i in range(n) if own[i] is None]
            low = _cat([highs[i] for i in shared], 1) if shared else None
            up = _cat([As[i].to(dy.dtype) for i in shared], 0) if shared else None
            with ctx.backend():
                dx = ctx.products.backward(dy, dense if ctx.q is None else ctx.q, low, up)
        if wants_base:
            d_base = (dy_rows.T @ _rows(x)).to(dense.dtype)
        db = sum_rows(dy, ctx.bias_dtype) if wants_bias else None
        return None, None, dx, d_base, db, *grads


def _scaled(scalings: Sequence[float], Bs: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    """s_i · B_i, rounded once."""
    return [(s * B).to(dtype) for s, B in zip(scalings, Bs, strict=True)]  # type: ignore[operator, union-attr]


def _cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """torch.cat, which copies even one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _forward(
    x: Tensor, base: Tensor | QuantizedTensor, bias: Tensor | None, low: Tensor | None, up: Tensor | None
) -> Tensor:
    return low_rank_product(x, _weight(base, x.dtype), bias, low, up)


def _backward(dy: Tensor, base: Tensor | QuantizedTensor, low: Tensor | None, up: Tensor | None) -> Tensor:
    return low_rank_product(dy, _weight(base, dy.dtype).T, None, low, None if up is None else up.T)


def _weight(base: Tensor | QuantizedTensor, dtype: torch.dtype) -> Tensor:
    return dequantize(base, dtype) if isinstance(base, QuantizedTensor) else base.to(dtype)


def low_rank_product(x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor | None, up: Tensor | None) -> Tensor:
    """x (…, K) · weightᵀ + low (M, r) · upᵀ + bias → (…, N), rounded once. weight (N, K), up (N, r), in x.dtype."""
    bias = None if bias is None else bias.to(x.dtype)
    if low is None or up is None:
        return linear(x, weight, bias)
    if x.dtype in (torch.float32, torch.float64):  # adding afterwards costs a last bit, and spares a copy of weight
        return torch.addmm(_rows(linear(x, weight, bias)), low, up.T).view(*x.shape[:-1], len(weight))
    side_by_side = torch.cat([x, low.view(*x.shape[:-1], low.shape[1])], -1)
    return F.linear(side_by_side, torch.cat([weight, up], 1), bias)


REFERENCE = Products(_forward, _backward)
register("lora_product", "reference")(_forward)
