"""lora_matmul: a frozen base, dense or quantized, with low-rank terms beside it.

LoRA, arXiv 2106.09685, eq. 3; QLoRA, arXiv 2305.14314, eq. 5.

    forward    y  = c ⊙ (x · Wᵀ + Σ_i s_i · (x_i · A_iᵀ) · B_iᵀ) + b
    backward   dx = (c ⊙ dy) · W + Σ_i s_i · ((c ⊙ dy) · B_i) · A_i          (the term where x_i is x)
               dA_i = s_i · ((c ⊙ dy) · B_i)ᵀ · x_i        dB_i = s_i · (c ⊙ dy)ᵀ · (x_i · A_iᵀ)

    W (N, K), A_i (r, K), B_i (N, r), s_i scaling; c (N,) is 1, or DoRA's m / ‖W + s·BA‖ by row; b (N,)

A fused kernel starts its accumulator from the low-rank terms; here the parts are composed, and autograd derives the
backward from theirs.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from quant import QuantizedTensor

from .dispatch import backend_for, implementation, register
from .matmul import linear, matmul


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
    run = implementation("lora_matmul", backend_for("lora_matmul", x.device))
    return run(x, base, adapters, bias, row_scale)


@register("lora_matmul", "reference")
def lora_matmul_reference(
    x: Tensor,
    base: Tensor | QuantizedTensor,
    adapters: Sequence[LoRATerm],
    bias: Tensor | None,
    row_scale: Tensor | None,
) -> Tensor:
    bias_now = bias if row_scale is None else None
    y = matmul(x, base, bias_now) if isinstance(base, QuantizedTensor) else linear(x, base, bias_now)
    for term in adapters:
        x_i = x if term.x is None else term.x
        y = y + term.scaling * linear(linear(x_i, term.A), term.B)
    if row_scale is not None:
        y = y * row_scale.to(y.dtype)
        y = y if bias is None else y + bias.to(y.dtype)
    return y
