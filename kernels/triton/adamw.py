"""adamw on a GPU: the optimizer's step in one pass over parameter, gradient and state, 32-bit or 8-bit.

    p ← p · (1 - lr·λ)       m ← m + (1-β₁)·(g - m)       v ← β₂·v + (1-β₂)·g²
    p ← p - lr/(1-β₁^t) · m / (√v / √(1-β₂^t) + ε)

What kernels/adamw.py defines, for fp32, bf16 and fp16 parameters and gradients and fp32 or 8-bit state; a bf16 or fp16
parameter is rounded once. 8-bit: a program has one block of 256 of both moments, decodes them, updates them in fp32,
takes each block's largest magnitude, and stores the nearest codes. A code is the number of thresholds at or below the
scaled value, found in 8 steps; map_tables says what they are. Everything else is the reference's.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..adamw import STATE_BLOCK, AdamWStep, adamw_8bit_reference, adamw_reference
from ..cpu.maps import map_tables
from ..dispatch import register
from .launch import EXACT, FLOATS, check_device, on_device_of
from .lookup import rounded

BLOCK = 1024  # elements to a program of the 32-bit kernel
NUMBERS = ("decay", "take1", "keep2", "take2", "root2", "eps", "rate")
"""1 - lr·λ, 1-β₁, β₂, 1-β₂, √(1-β₂^t), ε, -lr/(1-β₁^t)"""


@triton.jit
def _step(p, g, m, v, decay, take1, keep2, take2, root2, eps, rate):
    """p, m and v after the step, fp32."""
    m = m + take1 * (g - m)
    v = keep2 * v + take2 * g * g
    p = p * decay + rate * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root2 + tl.zeros_like(v)) + eps)
    return p, m, v


@triton.jit(do_not_specialize=["n"])
def adamw_kernel(p, g, m, v, n, decay, take1, keep2, take2, root2, eps, rate, BLOCK: tl.constexpr):
    """A program: BLOCK elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    old = tl.load(p + at, inside, other=0.0).to(tl.float32)
    gradient = tl.load(g + at, inside, other=0.0).to(tl.float32)
    exp_avg, exp_avg_sq = tl.load(m + at, inside, other=0.0), tl.load(v + at, inside, other=0.0)
    new, exp_avg, exp_avg_sq = _step(
        old, gradient, exp_avg, exp_avg_sq, decay, take1, keep2, take2, root2, eps, rate
    )  # fmt: skip
    tl.store(p + at, rounded(new, p.dtype.element_ty), inside)
    tl.store(m + at, exp_avg, inside)
    tl.store(v + at, exp_avg_sq, inside)


@triton.jit(do_not_specialize=["n"])
def adamw_8bit_kernel(
    p, g, m, m_absmax, v, v_absmax, m_level, m_threshold, v_level, v_threshold,
    n, decay, take1, keep2, take2, root2, eps, rate, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: one block. m and v are codes, uint8."""
    block = tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    old = tl.load(p + at, inside, other=0.0).to(tl.float32)
    gradient = tl.load(g + at, inside, other=0.0).to(tl.float32)
    exp_avg = tl.load(m_level + tl.load(m + at, inside, other=0).to(tl.int32)) * tl.load(m_absmax + block)
    exp_avg_sq = tl.load(v_level + tl.load(v + at, inside, other=0).to(tl.int32)) * tl.load(v_absmax + block)
    new, exp_avg, exp_avg_sq = _step(
        old, gradient, exp_avg, exp_avg_sq, decay, take1, keep2, take2, root2, eps, rate
    )  # fmt: skip
    tl.store(p + at, rounded(new, p.dtype.element_ty), inside)
    _store_state(m, m_absmax, tl.where(inside, exp_avg, 0.0), m_threshold, block, at, inside)
    _store_state(v, v_absmax, tl.where(inside, exp_avg_sq, 0.0), v_threshold, block, at, inside)


@triton.jit
def _store_state(codes, absmax, values, threshold, block, at, inside):
    size = tl.max(tl.abs(values), axis=0)
    representable = size > 2.0**-128  # at and below it, 1 / size overflows
    scales = tl.zeros_like(values) + tl.where(representable, size, 1.0)
    scaled = values * tl.where(representable, tl.div_rn(tl.full(values.shape, 1.0, tl.float32), scales), 0.0)
    code = tl.zeros_like(at).to(tl.int32)
    for step in tl.static_range(8):
        code += tl.where(scaled >= tl.load(threshold + code + ((128 >> step) - 1)), 128 >> step, 0)
    tl.store(codes + at, code.to(tl.uint8), inside)
    tl.store(absmax + block, tl.where(representable, size, 0.0))


@register("adamw", "triton")
def adamw_triton(p: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: AdamWStep) -> None:
    check_device("adamw", p)
    if not _served(torch.float32, p, g, exp_avg, exp_avg_sq):
        return adamw_reference(p, g, exp_avg, exp_avg_sq, step)
    n = p.numel()
    with on_device_of(p):
        adamw_kernel[(triton.cdiv(n, BLOCK),)](p, g, exp_avg, exp_avg_sq, n, *_numbers(step), BLOCK=BLOCK, **EXACT)


@register("adamw_8bit", "triton")
def adamw_8bit_triton(
    p: Tensor, g: Tensor, exp_avg: Tensor, absmax: Tensor, exp_avg_sq: Tensor, absmax_sq: Tensor, step: AdamWStep
) -> None:
    check_device("adamw_8bit", p)
    state = (exp_avg, absmax, exp_avg_sq, absmax_sq)
    scales_served = all(t.dtype == torch.float32 and t.is_contiguous() for t in (absmax, absmax_sq))
    if not (scales_served and _served(torch.uint8, p, g, exp_avg, exp_avg_sq)):
        return adamw_8bit_reference(p, g, *state, step)
    maps = (*_map(True, p.device), *_map(False, p.device))
    n = p.numel()
    with on_device_of(p):
        adamw_8bit_kernel[(triton.cdiv(n, STATE_BLOCK),)](
            p, g, *state, *maps, n, *_numbers(step), BLOCK=STATE_BLOCK, **EXACT
        )


def _served(state: torch.dtype, p: Tensor, g: Tensor, *moments: Tensor) -> bool:
    floats = p.dtype in FLOATS and g.dtype in FLOATS and p.numel() > 0
    return floats and all(t.dtype == state for t in moments) and all(t.is_contiguous() for t in (p, g, *moments))


def _numbers(step: AdamWStep) -> tuple[float, ...]:
    """NUMBERS of this step."""
    first, second = 1 - step.beta1**step.t, 1 - step.beta2**step.t
    rates = (1 - step.lr * step.weight_decay, 1 - step.beta1, step.beta2, 1 - step.beta2)
    return *rates, second**0.5, step.eps, -step.lr / first


@lru_cache
def _map(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Levels and thresholds, fp32 (256,) each."""
    level, threshold, _ = map_tables(signed)
    return level.to(device), threshold.to(device)
