"""lora_matmul on a GPU: a 4-bit base and its low-rank terms in one product, forward and backward.

    forward    y   = x · Ŵᵀ + low · upᵀ + b     one kernel: its accumulator starts from low · upᵀ
    backward   dx  = dy · Ŵ + low · up          the same

kernels/lora_matmul.py states the mathematics and says what low and up are: all adapters side by side along the rank, so
that their number does not change the kernel. Equals its reference within the accuracy of x.dtype. A dense base is the
reference's. A group of projections is composed of the single ones.
"""

from collections.abc import Sequence

from torch import Tensor

from quant import QuantizedTensor

from ..dispatch import register
from ..grouped_lora_matmul import grouped_lora_matmul_reference
from ..lora_matmul import LoRATerm, Products, composed, lora_matmul_reference
from .launch import check_device
from .matmul import backward, forward

PRODUCTS = Products(forward, backward)
register("lora_product", "triton")(forward)

register("grouped_lora_matmul", "triton")(grouped_lora_matmul_reference)


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
    return composed(PRODUCTS, x, base, adapters, bias, row_scale)
