"""RMSNorm, SwiGLU, rope and the sum with their backwards by hand: each keeps its inputs and nothing in between.

    rms_norm   y  = x · ρ ⊙ g                    ρ = 1 / √(mean(x²) + ε), one a row      (arXiv 1910.07467, eq. 4)
               dx = ρ · (u - x̂ · mean(u ⊙ x̂))    x̂ = x · ρ,  u = dy ⊙ g
               dg = Σ_rows dy ⊙ x̂
    swiglu     y  = silu(a) ⊙ b                  silu(a) = a · σ(a)                      (arXiv 2002.05202, eq. 5)
               db = dy ⊙ silu(a)
               da = dy ⊙ b ⊙ σ(a) · (1 + a · (1 - σ(a)))
    rope       y  = R(θ) x                       a rotation, so its transpose turns back: dx = R(-θ) dy
    add        z  = x + y                        the residual stream: dx = dy = dz

Autograd would keep every intermediate: for swiglu two more tensors as large as its inputs. Computed in fp32, rounded
once to the dtype of the input. Rope is linear: it keeps only its angles; the sum keeps nothing. Results, and what is
needed on the way, lie in kernels.buffers, and are worked on in place.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.buffers import empty_like


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


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, of equal shape and dtype: the residual stream, kept by every layer."""
    return _Add.apply(x, y)


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return torch.add(x, y, out=empty_like(x))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy, dy


def _wide(x: Tensor) -> torch.dtype:
    """What is computed in: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = empty_like(x, _wide(x))
        rho = torch.rsqrt(y.copy_(x).square_().mean(dim=-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, rho)
        return torch.mul(x, rho, out=y).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rho = ctx.saved_tensors
        x_hat = torch.mul(x, rho, out=empty_like(x, _wide(x)))
        dx = dg = None
        if ctx.needs_input_grad[1]:
            dg = (dy.to(x_hat.dtype) * x_hat).flatten(0, -2).sum(dim=0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            u = empty_like(x, _wide(x)).copy_(dy).mul_(weight)  # torch.mul(dy, weight, out=…) would round in dy.dtype
            along = torch.mul(u, x_hat, out=empty_like(x, _wide(x))).mean(dim=-1, keepdim=True)
            dx = u.sub_(x_hat.mul_(along)).mul_(rho).to(x.dtype)
        return dx, dg, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        y = empty_like(gate, _wide(gate)).copy_(gate)
        return F.silu(y, inplace=True).mul_(up).to(gate.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        s = torch.sigmoid(gate.to(_wide(gate)), out=empty_like(gate, _wide(gate)))
        d_gate = torch.mul(s, -1, out=empty_like(gate, _wide(gate))).add_(1).mul_(gate).add_(1)
        d_gate.mul_(s).mul_(up).mul_(dy)
        d_up = s.mul_(gate).mul_(dy)
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
    y = empty_like(x, _wide(x))
    y_first, y_second = y.chunk(2, dim=-1)
    y_first.copy_(first).mul_(cos).sub_(torch.mul(second, sin, out=empty_like(second, y.dtype)))
    y_second.copy_(second).mul_(cos).add_(torch.mul(first, sin, out=empty_like(first, y.dtype)))
    return y.to(x.dtype)
