"""lora: a 4-bit base with its low-rank terms in one product of the C kernels, forward and backward.

The kernel takes low · upᵀ as further steps of its reduction (kernels/lora_matmul.py states the mathematics), so that no
term makes another pass over y. The products with few columns or rows have kernels of their own (low_rank.h). A dense
base, and what the kernels cannot read, is the reference's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quant import QuantizedTensor

from ..dispatch import register
from ..grouped_lora_matmul import grouped_lora_matmul_reference
from ..linear_cross_entropy import linear_cross_entropy_reference
from ..lora_matmul import LoRATerm, Products, composed, lora_matmul_reference, narrow, outer
from .library import DTYPES, load, why_not
from .operations import PRODUCT_DTYPES, matmul_cpu, matmul_dx_cpu, why_not_product

ROWS = 64  # with fewer torch's products are as fast
PANEL = 32  # columns: a multiple of what low_rank.h takes at a time

# Its logits come from lora_matmul, a chunk at a time: what is to be fast in it is there.
register("linear_cross_entropy", "cpu")(linear_cross_entropy_reference)
register("grouped_lora_matmul", "cpu")(grouped_lora_matmul_reference)


def narrow_cpu(x: Tensor, A: Tensor) -> Tensor:
    """As kernels.lora_matmul.narrow."""
    if len(x) < ROWS or x.dtype != A.dtype or why_not(PRODUCT_DTYPES, x, A):
        return narrow(x, A)
    (M, K), r = x.shape, len(A)
    y = torch.empty(M, r)
    load().narrow(x.data_ptr(), A.data_ptr(), DTYPES[x.dtype], M, r, K, y.data_ptr(), torch.get_num_threads())
    return y.to(x.dtype)


def outer_cpu(h: Tensor, x: Tensor) -> Tensor:
    """As kernels.lora_matmul.outer; C's is fp32."""
    if len(x) < ROWS or x.shape[1] % PANEL or h.dtype != x.dtype or why_not(PRODUCT_DTYPES, h, x):
        return outer(h, x)
    (M, r), K = h.shape, x.shape[1]
    y = torch.empty(r, K)
    load().outer(h.data_ptr(), x.data_ptr(), DTYPES[x.dtype], M, r, K, y.data_ptr(), torch.get_num_threads())
    return y


PRODUCTS = Products(matmul_cpu, matmul_dx_cpu, narrow_cpu, outer_cpu)
register("lora_product", "cpu", unless=why_not_product)(matmul_cpu)


@register("lora_matmul", "cpu")
def lora_matmul_cpu(
    x: Tensor,
    base: Tensor | QuantizedTensor,
    adapters: Sequence[LoRATerm],
    bias: Tensor | None,
    row_scale: Tensor | None,
) -> Tensor:
    if isinstance(base, Tensor) or why_not_product(x, base):
        return lora_matmul_reference(x, base, adapters, bias, row_scale)
    return composed(PRODUCTS, x, base, adapters, bias, row_scale)
