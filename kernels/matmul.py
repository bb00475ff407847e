"""matmul: a linear layer whose frozen weight is quantized.

    forward    y  = x · Ŵᵀ + b                   Ŵ = dequantize(q), (N, K), in x.dtype
    backward   dx = dy · Ŵ,  db = Σ_rows dy      q is frozen: it has no gradient

    M rows of x (all leading dimensions), K = in_features, N = out_features

Only q is saved for backward: Ŵ is dequantized again, never kept. `linear` is the dense twin, for a weight whose dtype
may differ from the activations' (fp32 master weights under bf16 activations): the cast copy is not kept either.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quant import QuantizedTensor

from . import ops
from .buffers import empty
from .dequantize import dequantize
from .dispatch import asked_backend, backend_for, implementation, register, use_backend


def matmul(x: Tensor, q: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """x (…, K) · dequantize(q)ᵀ (K, N) + bias (N,) → (…, N) in x.dtype. Differentiable in x and bias.

    Raises ValueError when q is not 2-D, x's last dimension is not q's K, or bias is not (N,).
    """
    if len(q.shape) != 2 or x.shape[-1] != q.shape[1]:
        raise ValueError(f"matmul needs x (…, K) and a quantized weight (N, K), got {tuple(x.shape)} and {q.shape}")
    check_length("bias", bias, q.shape[0])
    if torch.compiler.is_compiling():
        return ops.matmul(x, q, bias)
    if not torch.is_grad_enabled():  # decoding: autograd's bookkeeping would cost as much as a small product
        return implementation("matmul", backend_for("matmul", x.device, x, q))(x, q, bias)
    return _QuantizedMatmul.apply(x, bias, q)


def check_length(name: str, vector: Tensor | None, N: int) -> None:
    """Raises ValueError unless vector is None or (N,): a kernel would read past the end of a shorter one."""
    if vector is not None and vector.shape != (N,):
        raise ValueError(f"{name} must be ({N},), got {tuple(vector.shape)}")


@register("matmul", "reference")
def matmul_reference(x: Tensor, q: QuantizedTensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, dequantize(q, x.dtype), None if bias is None else bias.to(x.dtype))


@register("matmul_dx", "reference")
def matmul_dx_reference(dy: Tensor, q: QuantizedTensor) -> Tensor:
    return dy @ dequantize(q, dy.dtype)


class _QuantizedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, q: QuantizedTensor) -> Tensor:
        ctx.backend = backend_for("matmul", x.device, x, q)
        ctx.q = q
        ctx.bias_dtype = None if bias is None else bias.dtype
        with use_backend(ctx.backend):
            return implementation("matmul", ctx.backend)(x, q, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dx = db = None
        if ctx.needs_input_grad[0]:
            with use_backend(ctx.backend):
                dx = implementation("matmul_dx", ctx.backend)(dy, ctx.q)
        if ctx.needs_input_grad[1]:
            db = sum_rows(dy, ctx.bias_dtype)
        return dx, db, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """x (…, K) · weightᵀ (K, N) + bias (N,) → (…, N) in out_dtype, x's by default.

    Gradients come in the dtype of what they belong to. Where C serves and no gradient is wanted, what comes in fp32 was
    never rounded to x.dtype.
    """
    out_dtype = out_dtype or x.dtype
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():  # decoding: a cast would be the work
        y = product_in_c(x.reshape(-1, x.shape[-1]), weight)
        if y is not None:
            y = y if bias is None else y.add_(bias)
            return y.view(*x.shape[:-1], len(weight)).to(out_dtype)
    if weight.dtype == x.dtype:
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype)).to(out_dtype)
    return _CastLinear.apply(x, weight, bias).to(out_dtype)


def product_in_c(x: Tensor, weight: Tensor) -> Tensor | None:
    """x (M, K) · weightᵀ → fp32 (M, N), without a cast of the weight; None where no C kernel serves."""
    if asked_backend() not in ("auto", "cpu"):
        return None
    from .cpu import dense  # the C kernels are a backend like any other: this file does not need them

    if not dense.serves(x, weight):
        return None
    return dense.product(x, weight, empty((len(x), len(weight)), torch.float32))


class _CastLinear(torch.autograd.Function):
    """The cast of the weight is made again in backward: saving it would keep a copy of the model."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = dweight = db = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight.to(dy.dtype)
        if ctx.needs_input_grad[1]:
            dweight = (dy.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            db = sum_rows(dy, ctx.bias_dtype)
        return dx, dweight, db


def sum_rows(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """dy (…, N) → (N,), accumulated in fp32 at least."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    return dy.reshape(-1, dy.shape[-1]).sum(dim=0, dtype=wide).to(dtype)
