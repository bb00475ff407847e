"""The products as operators that torch.compile sees: registered with torch.library, with shapes and gradients.

    qlora::matmul_4bit(x, bias, low, up, packed, …) → y = x · Ŵᵀ + low · upᵀ + bias
    qlora::matmul_4bit_dx(dy, packed, …) → dy · Ŵ

kernels.matmul and kernels.lora_matmul take them while torch.compile traces: what chooses a backend (a context variable,
the environment) and a C kernel's pointers cannot be traced, an operator is one node of the graph. Inside it the choice
is made as always, where and when it runs: so forward and backward each ask for the backend that is wanted then.

A QuantizedTensor is no tensor: its parts are the arguments, in the order of `parts`. In y the low-rank terms stand in
the accumulator, as without torch.compile; in dx their share is added afterwards, and rounded apart.
"""

from typing import Any

import torch
from torch import Tensor

from quant import QuantizedTensor
from quant.double_quant import BLOCKSIZE2

from .dispatch import backend_for, implementation

PARTS = (
    "Tensor packed, Tensor code, Tensor absmax, Tensor absmax_code, Tensor absmax2, Tensor absmax_offset, "
    "int N, int K, int blocksize, bool double_quant, str quant_type"
)
"""`parts`, as torch.library writes the arguments of an operator."""


def matmul(
    x: Tensor, q: QuantizedTensor, bias: Tensor | None = None, low: Tensor | None = None, up: Tensor | None = None
) -> Tensor:
    """x (…, K) · dequantize(q)ᵀ + low (M, r) · up (N, r)ᵀ + bias → (…, N), one operator. q has no gradient."""
    return matmul_4bit(x, bias, low, up, *parts(q))


def parts(q: QuantizedTensor) -> tuple[Any, ...]:
    """Six tensors, N, K, block size, two levels of scales or not, and the type's name. Unused tensors repeat absmax."""
    rest = (*q.shape, q.blocksize, q.double_quant, q.quant_type)
    if q.absmax_8bit is None:
        absmax = q.scales()
        return q.packed, q.code, absmax, absmax, absmax, absmax, *rest
    return q.packed, q.code, q.absmax_8bit, q.absmax_code, q.absmax2, q.absmax_offset, *rest


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


@torch.library.custom_op(
    "qlora::matmul_4bit",
    mutates_args=(),
    schema=f"(Tensor x, Tensor? bias, Tensor? low, Tensor? up, {PARTS}) -> Tensor",
)
def matmul_4bit(x: Tensor, bias: Tensor | None, low: Tensor | None, up: Tensor | None, *weight: Any) -> Tensor:
    """x (…, K) → (…, N) in x.dtype."""
    q = _whole(*weight)
    if low is None:
        return implementation("matmul", backend_for("matmul", x.device, x, q))(x, q, bias)
    return implementation("lora_product", backend_for("lora_product", x.device, x, q))(x, q, bias, low, up)


@torch.library.custom_op("qlora::matmul_4bit_dx", mutates_args=(), schema=f"(Tensor dy, {PARTS}) -> Tensor")
def matmul_4bit_dx(dy: Tensor, *weight: Any) -> Tensor:
    """dy (…, N) → (…, K) in dy.dtype."""
    q = _whole(*weight)
    return implementation("matmul_dx", backend_for("matmul_dx", dy.device, dy, q))(dy, q)


@matmul_4bit.register_fake
def _(x: Tensor, bias: Tensor | None, low: Tensor | None, up: Tensor | None, *weight: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight[6])  # N


@matmul_4bit_dx.register_fake
def _(dy: Tensor, *weight: Any) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], weight[7])  # K


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, low, up, *weight = inputs
    ctx.save_for_backward(low, up, *weight[:6])
    ctx.rest = weight[6:]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    from .matmul import sum_rows  # which imports this module

    low, up, *tensors = ctx.saved_tensors
    wants_x, wants_bias, wants_low, wants_up = ctx.needs_input_grad[:4]
    rows = dy.reshape(-1, dy.shape[-1])
    dx = matmul_4bit_dx(dy, *tensors, *ctx.rest) if wants_x else None
    db = sum_rows(dy, ctx.bias_dtype) if wants_bias else None
    return dx, db, rows @ up if wants_low else None, rows.T @ low if wants_up else None, *[None] * 11


matmul_4bit.register_autograd(_gradients, setup_context=_save)
