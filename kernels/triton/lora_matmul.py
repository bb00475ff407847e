"""lora_matmul on a GPU: a 4-bit base and its low-rank terms in one product, forward and backward.

    forward    S_i = s_i · x_i · A_iᵀ          (M, r_i), dense products in x.dtype
               y   = x · Ŵᵀ + [S_1 S_2 …] · [B_1 B_2 …]ᵀ + b          one kernel: its accumulator starts from the terms
    backward   D_i = s_i · dy · B_i            (M, r_i)
               dx  = dy · Ŵ + [D_i …] · [A_i …]          one kernel: the terms whose x_i is x
               dx_i = D_i · A_i                (the others)       dA_i = D_iᵀ · x_i       dB_i = dyᵀ · S_i

Several adapters stand side by side along the rank, so that their number does not change the kernel. Saved for backward:
x, each x_i that is another tensor, A_i, B_i and S_i; never Ŵ. Equals kernels/lora_matmul.py's reference within the
accuracy of x.dtype. Composed from parts, as there, are: a dense base, and DoRA's row scale, which is applied to the
fused product of base and terms.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quant import QuantizedTensor

from ..dispatch import register
from ..lora_matmul import LoRATerm, lora_matmul_reference
from ..matmul import sum_rows
from .launch import check_device
from .matmul import Low, backward, forward


@register("lora_matmul", "triton")
def lora_matmul_triton(
    x: Tensor,
    base: Tensor | QuantizedTensor,
    adapters: Sequence[LoRATerm],
    bias: Tensor | None,
    row_scale: Tensor | None,
) -> Tensor:
    """x (…, K) → (…, N) in x.dtype."""
    check_device("lora_matmul", x)
    if isinstance(base, Tensor):
        return lora_matmul_reference(x, base, adapters, bias, row_scale)
    tensors = [t for term in adapters for t in (term.A, term.B, x if term.x is None else term.x)]
    scalings = tuple(term.scaling for term in adapters)
    own_x = tuple(term.x is not None for term in adapters)
    y = _LoRAMatmul.apply(x, bias if row_scale is None else None, base, scalings, own_x, *tensors)
    if row_scale is not None:
        y = y * row_scale.to(y.dtype)
        y = y if bias is None else y + bias.to(y.dtype)
    return y


class _LoRAMatmul(torch.autograd.Function):
    """Tensors after `own_x`: A, B and the input of each adapter. An input that is x itself gets no gradient apart."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        q: QuantizedTensor,
        scalings: tuple[float, ...],
        own_x: tuple[bool, ...],
        *tensors: Tensor,
    ) -> Tensor:
        As, Bs, inputs = tensors[0::3], tensors[1::3], tensors[2::3]
        S = [s * (_rows(x_i) @ A.to(x.dtype).T) for s, A, x_i in zip(scalings, As, inputs, strict=True)]
        ctx.save_for_backward(*tensors, *S)
        ctx.q, ctx.scalings, ctx.own_x = q, scalings, own_x
        ctx.bias_dtype = None if bias is None else bias.dtype
        return forward(x, q, bias, _side_by_side(S, [B.to(x.dtype) for B in Bs], 1))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        n = len(ctx.scalings)
        tensors, S = tensors[: 3 * n], tensors[3 * n :]
        As, Bs, inputs = tensors[0::3], tensors[1::3], tensors[2::3]
        rows = _rows(dy)
        D = [s * (rows @ B.to(dy.dtype)) for s, B in zip(ctx.scalings, Bs, strict=True)]
        wanted = ctx.needs_input_grad
        grads: list[Tensor | None] = []
        for i, (A, B, x_i) in enumerate(zip(As, Bs, inputs, strict=True)):
            wants = wanted[5 + 3 * i : 8 + 3 * i]
            grads.append((D[i].T @ _rows(x_i)).to(A.dtype) if wants[0] else None)
            grads.append((rows.T @ S[i]).to(B.dtype) if wants[1] else None)
            grads.append((D[i] @ A.to(dy.dtype)).view_as(x_i) if wants[2] and ctx.own_x[i] else None)
        shared = [i for i in range(n) if not ctx.own_x[i]]
        lora = _side_by_side([D[i] for i in shared], [As[i].to(dy.dtype) for i in shared], 0)
        dx = backward(dy, ctx.q, lora) if wanted[0] else None
        db = sum_rows(dy, ctx.bias_dtype) if wanted[1] else None
        return dx, db, None, None, None, *grads


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _side_by_side(low: Sequence[Tensor], up: Sequence[Tensor], rank_dim: int) -> Low | None:
    """All adapters' factors as one pair; None without adapters."""
    if not low:
        return None
    return torch.cat(list(low), dim=1), torch.cat(list(up), dim=rank_dim)
