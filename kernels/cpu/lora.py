"""lora: a 4-bit base with its low-rank terms in one product, forward and backward.

    forward    y  = x · Ŵᵀ + L · Uᵀ + b             L = [s_1 x_1 A_1ᵀ, …] (M, Σr)    U = [B_1, …] (N, Σr)
    backward   dx = dy · Ŵ + G · V                  G = [s_i dy B_i, …] where x_i is x    V = [A_i, …] (Σr, K)
               dA_i = (s_i dy B_i)ᵀ · x_i           dB_i = dyᵀ · (s_i x_i A_iᵀ)
               dx_i = (s_i dy B_i) · A_i            for a term with an input of its own

(kernels/lora_matmul.py states the mathematics.) The kernel takes L · Uᵀ as further steps of its reduction, so that no
term makes another pass over y. A dense base, or a row_scale, is composed from parts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quant import QuantizedTensor

from ..dispatch import register
from ..linear_cross_entropy import linear_cross_entropy_reference
from ..lora_matmul import LoRATerm, lora_matmul_reference
from ..matmul import sum_rows
from .operations import matmul_cpu, matmul_dx_cpu, why_not_product

# Its logits come from lora_matmul, a chunk at a time: what is to be fast in it is there.
register("linear_cross_entropy", "cpu")(linear_cross_entropy_reference)


@register("lora_matmul", "cpu")
def lora_matmul_cpu(
    x: Tensor,
    base: Tensor | QuantizedTensor,
    adapters: Sequence[LoRATerm],
    bias: Tensor | None,
    row_scale: Tensor | None,
) -> Tensor:
    if isinstance(base, Tensor) or row_scale is not None or not adapters or why_not_product(x, base):
        return lora_matmul_reference(x, base, adapters, bias, row_scale)
    inputs = [x if term.x is None else term.x for term in adapters]
    factors = [t for term in adapters for t in (term.A, term.B)]
    own = tuple(term.x is not None for term in adapters)
    scalings = tuple(term.scaling for term in adapters)
    if not torch.is_grad_enabled():
        return _forward(x, bias, base, scalings, inputs, factors)[0]
    own_inputs = [term.x for term in adapters if term.x is not None]
    return _LoRAMatmul.apply(x, bias, base, scalings, own, *own_inputs, *factors)


def _forward(
    x: Tensor,
    bias: Tensor | None,
    q: QuantizedTensor,
    scalings: tuple[float, ...],
    inputs: Sequence[Tensor],
    factors: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """y, and each s · x Aᵀ (M, r) in x.dtype."""
    lows = [
        s * (x_i.reshape(-1, x_i.shape[-1]) @ A.to(x.dtype).T)
        for s, x_i, A in zip(scalings, inputs, factors[::2], strict=True)
    ]
    ups = [B.to(x.dtype) for B in factors[1::2]]
    return matmul_cpu(x, q, bias, _joined(lows, 1), _joined(ups, 1)), lows


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Side by side, fp32 and contiguous, as the kernel takes them."""
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)
    return whole.float().contiguous()


class _LoRAMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        q: QuantizedTensor,
        scalings: tuple[float, ...],
        own: tuple[bool, ...],
        *tensors: Tensor,
    ) -> Tensor:
        n_own = sum(own)
        inputs = _inputs(x, own, tensors[:n_own])
        y, lows = _forward(x, bias, q, scalings, inputs, tensors[n_own:])
        ctx.q, ctx.scalings, ctx.own = q, scalings, own
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, *tensors, *lows)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        n, n_own = len(ctx.own), sum(ctx.own)
        own_inputs, factors, lows = rest[:n_own], rest[n_own : n_own + 2 * n], rest[n_own + 2 * n :]
        wants = ctx.needs_input_grad
        dy_rows = dy.reshape(-1, dy.shape[-1])
        highs = [s * (dy_rows @ B.to(dy.dtype)) for s, B in zip(ctx.scalings, factors[1::2], strict=True)]

        d_factors: list[Tensor | None] = []
        d_own: list[Tensor | None] = []
        inputs = _inputs(x, ctx.own, own_inputs)
        for i, (A, B) in enumerate(zip(factors[::2], factors[1::2], strict=True)):
            x_rows = inputs[i].reshape(-1, x.shape[-1])
            at = 5 + n_own + 2 * i
            d_factors.append((highs[i].T @ x_rows).to(A.dtype) if wants[at] else None)
            d_factors.append((dy_rows.T @ lows[i]).to(B.dtype) if wants[at + 1] else None)
            if ctx.own[i]:
                d_own.append((highs[i] @ A.to(dy.dtype)).view(x.shape) if wants[5 + len(d_own)] else None)

        dx = None
        if wants[0]:
            shared = [i for i in range(n) if not ctx.own[i]]
            low = _joined([highs[i] for i in shared], 1) if shared else None
            up = _joined([factors[2 * i].to(dy.dtype) for i in shared], 0) if shared else None
            dx = matmul_dx_cpu(dy, ctx.q, low, up)
        db = sum_rows(dy, ctx.bias_dtype) if wants[1] else None
        return dx, db, None, None, None, *d_own, *d_factors


def _inputs(x: Tensor, own: tuple[bool, ...], own_inputs: Sequence[Tensor]) -> list[Tensor]:
    """The input of each term: its own, or x."""
    rest = iter(own_inputs)
    return [next(rest) if has_own else x for has_own in own]
