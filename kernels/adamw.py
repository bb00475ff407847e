"""adamw: one AdamW step on a run of elements, with the state in floating point or in blocks of 8 bits.

    p ← p · (1 - lr·λ)                        decoupled weight decay, first, as in torch (arXiv 1711.05101, algorithm 2)
    m ← β₁·m + (1-β₁)·g                       exp_avg
    v ← β₂·v + (1-β₂)·g²                      exp_avg_sq
    p ← p - lr/(1-β₁^t) · m / (√v / √(1-β₂^t) + ε)

8-bit state (arXiv 2110.02861): m and v are read from their codes, updated in fp32, and stored again. A block of 256 has
one absmax; m uses the signed dynamic map, v, which is never negative, the unsigned one; the nearest code is exact, a
tie goes to the even index.

All tensors have n elements in one row, but absmax, which has ⌈n / 256⌉. All are updated in place. The state is fp32
(fp64 for fp64 parameters); a bf16 or fp16 parameter is read into the state's dtype and rounded once at the end.
"""

from dataclasses import dataclass

from torch import Tensor

from quant import dynamic_map
from quant.double_quant import quantize_8bit
from quant.tensor import shared_map

from .dispatch import backend_for, implementation, register

STATE_BLOCK = 256


@dataclass(frozen=True)
class AdamWStep:
    """The numbers of step t, counted from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    t: int
    threads: int | None = None
    """That a CPU kernel may use; by default all of torch's. No bit depends on it."""


def adamw(p: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: AdamWStep) -> None:
    """Update p, exp_avg and exp_avg_sq (n,) by the gradient g (n,). Raises ValueError when their lengths differ."""
    _check_lengths(p.numel(), p, g, exp_avg, exp_avg_sq)
    call = (p, g, exp_avg, exp_avg_sq, step)
    implementation("adamw", backend_for("adamw", p.device, *call))(*call)


def adamw_8bit(
    p: Tensor, g: Tensor, exp_avg: Tensor, absmax: Tensor, exp_avg_sq: Tensor, absmax_sq: Tensor, step: AdamWStep
) -> None:
    """The same with codes uint8 (n,) and absmax fp32 (⌈n / 256⌉,) of both moments."""
    _check_lengths(p.numel(), p, g, exp_avg, exp_avg_sq)
    _check_lengths(-(-p.numel() // STATE_BLOCK), absmax, absmax_sq)
    call = (p, g, exp_avg, absmax, exp_avg_sq, absmax_sq, step)
    implementation("adamw_8bit", backend_for("adamw_8bit", p.device, *call))(*call)


def _check_lengths(n: int, *tensors: Tensor) -> None:
    if any(t.shape != (n,) for t in tensors):
        raise ValueError(f"adamw needs tensors of {n} elements in one row, got {[tuple(t.shape) for t in tensors]}")


@register("adamw", "reference")
def adamw_reference(p: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: AdamWStep) -> None:
    """torch.optim.AdamW's operations in its order, so that a CPU gives its bits."""
    exact, g = p.to(exp_avg.dtype), g.to(exp_avg.dtype)
    exact.mul_(1 - step.lr * step.weight_decay)
    exp_avg.lerp_(g, 1 - step.beta1)
    exp_avg_sq.mul_(step.beta2).addcmul_(g, g, value=1 - step.beta2)
    denominator = (exp_avg_sq.sqrt() / (1 - step.beta2**step.t) ** 0.5).add_(step.eps)
    exact.addcdiv_(exp_avg, denominator, value=-(step.lr / (1 - step.beta1**step.t)))
    if exact is not p:
        p.copy_(exact)


@register("adamw_8bit", "reference")
def adamw_8bit_reference(
    p: Tensor, g: Tensor, exp_avg: Tensor, absmax: Tensor, exp_avg_sq: Tensor, absmax_sq: Tensor, step: AdamWStep
) -> None:
    m = dequantize_state(exp_avg, absmax, signed=True)
    v = dequantize_state(exp_avg_sq, absmax_sq, signed=False)
    adamw_reference(p, g, m, v, step)
    for codes, scales, values, signed in ((exp_avg, absmax, m, True), (exp_avg_sq, absmax_sq, v, False)):
        new_codes, new_scales = quantize_state(values, signed=signed)
        codes.copy_(new_codes)
        scales.copy_(new_scales)


def quantize_state(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """fp32 (n,) → codes uint8 (n,), absmax fp32 (⌈n / 256⌉,)."""
    return quantize_8bit(values, shared_map(dynamic_map(signed), values.device), STATE_BLOCK)


def dequantize_state(codes: Tensor, absmax: Tensor, *, signed: bool) -> Tensor:
    """Codes uint8 (n,), absmax fp32 (⌈n / 256⌉,) → fp32 (n,)."""
    levels = shared_map(dynamic_map(signed), codes.device)
    return levels[codes.int()] * absmax.repeat_interleave(STATE_BLOCK)[: codes.numel()]
