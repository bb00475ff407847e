"""RMSNorm, SwiGLU and rope with their backwards by hand, so that each keeps its inputs and nothing in between.

    rms_norm   y  = x · ρ ⊙ g                    ρ = 1 / √(mean(x²) + ε), one a row      (arXiv 1910.07467, eq. 4)
               dx = ρ · (u - x̂ · mean(u ⊙ x̂))    x̂ = x · ρ,  u = dy ⊙ g
               dg = Σ_rows dy ⊙ x̂
    swiglu     y  = silu(a) ⊙ b                  silu(a) = a · σ(a)                      (arXiv 2002.05202, eq. 5)
               db = dy ⊙ silu(a)
               da = dy ⊙ b ⊙ σ(a) · (1 + a · (1 - σ(a)))
    rope       y  = R(θ) x                       a rotation, so its transpose turns back: dx = R(-θ) dy

Autograd would keep every intermediate: for swiglu two more tensors as large as its inputs. Computed in fp32, rounded
once to the dtype of the input. Rope is linear: it keeps only its angles.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (…, D), weight g (D,) → (…, D) in x.dtype. Differentiable in both."""
    return _RMSNorm.apply(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ⊙ up, of equal shapes, in their dtype."""
    return _SwiGLU.apply(gate, up)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, Dh) → the same, each pair (i, i + Dh/2) turned by its angle; cos and sin fp32 (B or 1, T, 1, Dh/2).

    Computed in fp32, returned in x.dtype.
    """
    return _Rotate.apply(x, cos, sin)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        rho = torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rho)
        return (wide * rho).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rho = ctx.saved_tensors
        x_hat = x.float() * rho
        u = dy.float() * weight
        dx = dg = None
        if ctx.needs_input_grad[0]:
            dx = ((u - x_hat * (u * x_hat).mean(dim=-1, keepdim=True)) * rho).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dg = (dy.float() * x_hat).flatten(0, -2).sum(dim=0).to(weight.dtype)
        return dx, dg, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate.float()).mul_(up).to(gate.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = (t.float() for t in ctx.saved_tensors)
        s = torch.sigmoid(gate)
        d_up = dy * gate * s
        d_gate = (1 - s).mul_(gate).add_(1).mul_(s).mul_(up).mul_(dy)
        return d_gate.to(dy.dtype), d_up.to(dy.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(dy, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
