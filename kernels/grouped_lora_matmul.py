"""grouped_lora_matmul: several projections of one input in one call, as q, k and v, or gate and up.

    y_i = c_i ⊙ (x · W_iᵀ + Σ_j s_ij · (x_ij · A_ijᵀ) · B_ijᵀ) + b_i             each as lora_matmul.py defines it

Equal to the separate calls to the bit: what is shared is the cost of a call, which in decoding is as much as the work.
The C kernels take up to 8 rows of x in one call where no gradient is wanted. Everything else, every GPU among it, is
composed of the separate calls.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from quant import QuantizedTensor

from .dispatch import backend_for, implementation, register
from .lora_matmul import LoRATerm, lora_matmul


class Projection(NamedTuple):
    """What lora_matmul takes besides x."""

    base: Tensor | QuantizedTensor
    """(N, K)"""
    adapters: Sequence[LoRATerm] = ()
    bias: Tensor | None = None
    """(N,)"""
    row_scale: Tensor | None = None
    """(N,)"""


def grouped_lora_matmul(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """x (…, K) → (…, N_i) in x.dtype for every projection. Differentiable as lora_matmul is, with its errors."""
    run = implementation("grouped_lora_matmul", backend_for("grouped_lora_matmul", x.device))
    return run(x, projections)


@register("grouped_lora_matmul", "reference")
def grouped_lora_matmul_reference(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """The separate calls, one after another."""
    return tuple(lora_matmul(x, p.base, p.adapters, bias=p.bias, row_scale=p.row_scale) for p in projections)
