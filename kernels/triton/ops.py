"""The products as operators that torch.compile sees: registered with torch.library, with shapes and gradients.

    qlora::matmul_4bit(x, bias, packed, …) → y          qlora::matmul_4bit_dx(dy, packed, …) → dx

A QuantizedTensor is no tensor, so its parts are the arguments, in the order of `parts`. `matmul` is what to call
from a model that is to be compiled: kernels.matmul reads the backend from a context variable, at which torch.compile
would break the graph. These always take the Triton backend's way: a fused kernel, or dequantize and torch.matmul.
"""

from typing import Any

import torch
from torch import Tensor

from quant import QuantizedTensor
from quant.double_quant import BLOCKSIZE2

from ..dispatch import use_backend
from ..matmul import sum_rows
from .launch import weight_arguments
from .matmul import backward, forward

PARTS = (
    "Tensor packed, Tensor code, Tensor absmax, Tensor absmax_code, Tensor absmax2, Tensor absmax_offset, "
    "int N, int K, int blocksize, bool double_quant, str quant_type"
)
"""`parts`, as torch.library writes the arguments of an operator."""


def matmul(x: Tensor, q: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """x (…, K) · dequantize(q)ᵀ + bias → (…, N) in x.dtype, as one operator. Differentiable in x and bias."""
    return matmul_4bit(x, bias, *parts(q))


def parts(q: QuantizedTensor) -> tuple[Any, ...]:
    """Six tensors (launch.weight_arguments), N, K, block size, two levels of scales or not, and the type's name."""
    return *weight_arguments(q), *q.shape, q.blocksize, q.double_quant, q.quant_type


def _whole(
    packed: Tensor,
    code: Tensor,
    absmax: Tensor,
    absmax_code: Tensor,
    absmax2: Tensor,
    absmax_offset: Tensor,
    N: int,
    K: int,
    blocksize: int,
    double_quant: bool,
    quant_type: str,
) -> QuantizedTensor:
    """What `parts` took apart."""
    common = (blocksize, (N, K), torch.float32, quant_type)
    if not double_quant:
        return QuantizedTensor(packed, code, absmax, *common)
    return QuantizedTensor(packed, code, None, *common, absmax, absmax_code, absmax2, absmax_offset, BLOCKSIZE2)


@torch.library.custom_op("qlora::matmul_4bit", mutates_args=(), schema=f"(Tensor x, Tensor? bias, {PARTS}) -> Tensor")
def matmul_4bit(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    """x (…, K) → (…, N) in x.dtype."""
    with use_backend("triton"):
        return forward(x, _whole(*weight), bias)


@torch.library.custom_op("qlora::matmul_4bit_dx", mutates_args=(), schema=f"(Tensor dy, {PARTS}) -> Tensor")
def matmul_4bit_dx(dy: Tensor, *weight: Any) -> Tensor:
    """dy (…, N) → (…, K) in dy.dtype."""
    with use_backend("triton"):
        return backward(dy, _whole(*weight))


@matmul_4bit.register_fake
def _(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight[6])  # N


@matmul_4bit_dx.register_fake
def _(dy: Tensor, *weight: Any) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], weight[7])  # K


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, *weight = inputs
    ctx.save_for_backward(*weight[:6])
    ctx.rest = weight[6:]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx = matmul_4bit_dx(dy, *ctx.saved_tensors, *ctx.rest) if ctx.needs_input_grad[0] else None
    db = sum_rows(dy, ctx.bias_dtype) if ctx.needs_input_grad[1] else None
    return dx, db, *[None] * 11


matmul_4bit.register_autograd(_gradients, setup_context=_save)
