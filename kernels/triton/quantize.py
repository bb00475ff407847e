"""quantize on a GPU: absmax of each block, nearest code of each weight, two codes a byte, in one pass.

    absmax = max |w|        s = w · (1 / absmax)        index = how many midpoints of the sorted code book lie below s

Equals quant.quantize to the bit: a product with the correctly rounded reciprocal, ties to the lower code, absmax 0 for
a block whose reciprocal is not finite. The second level is quant.double_quant on the same device: it is 64 times
smaller. Codes of other widths than 4 bits, and what quantize refuses, go to quant.quantize.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

import quant
from quant.blockwise import BLOCKSIZES, double_quantize, nearest_table
from quant.codebook import codebook
from quant.tensor import shared_map

from ..dispatch import register
from ..quantize import FOUR_BIT_TYPES
from .launch import EXACT, check_device, on_device_of

WEIGHTS = 2048  # to a program


@triton.jit
def quantize_kernel(weight, midpoints, indices, packed, absmax, n, BLOCKSIZE: tl.constexpr, ROWS: tl.constexpr):
    """A program: ROWS blocks. midpoints fp32 (15,), padded with infinity; indices int32 (16,), by sorted level."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    values = tl.load(weight + at, at < n, other=0.0).to(tl.float32)
    infinite = (values.to(tl.uint32, bitcast=True) & 0x7F800000) == 0x7F800000  # infinity or NaN
    values = tl.where(infinite, 0.0, values)
    size = tl.max(tl.abs(values), axis=1)
    representable = size > 2.0**-128  # at and below it, 1 / size overflows
    inverse = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), tl.where(representable, size, 1.0))
    scaled = values * tl.where(representable, inverse, 0.0)[:, None]
    below = tl.zeros((ROWS, BLOCKSIZE), tl.int32)
    for i in tl.static_range(15):
        below += (scaled > tl.load(midpoints + i)).to(tl.int32)
    index = tl.load(indices + below)
    first, second = tl.split(tl.reshape(index, (ROWS, BLOCKSIZE // 2, 2)))
    byte = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(packed + byte, (first * 16 + second).to(tl.uint8), byte < (n + 1) // 2)
    found = tl.max(infinite.to(tl.int32), axis=1) > 0
    size = tl.where(found, float("inf"), tl.where(representable, size, 0.0))
    tl.store(absmax + block, size, block * BLOCKSIZE < n)


@register("quantize", "triton")
def quantize_triton(
    weight: Tensor, *, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True
) -> quant.QuantizedTensor:
    """As quant.quantize, with its errors."""
    check_device("quantize", weight)
    served = quant_type in FOUR_BIT_TYPES and blocksize in BLOCKSIZES and weight.is_floating_point() and weight.numel()
    if not served:
        return quant.quantize(weight, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant)
    flat = weight.detach().reshape(-1).contiguous()
    flat = flat.float() if flat.dtype == torch.float64 else flat
    n, device = flat.numel(), flat.device
    packed = torch.empty(-(-n // 2), dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device=device)
    rows = max(1, WEIGHTS // blocksize)
    tables = _nearest(quant_type, device)
    with on_device_of(flat):
        quantize_kernel[(triton.cdiv(len(absmax), rows),)](
            flat, *tables, packed, absmax, n, BLOCKSIZE=blocksize, ROWS=rows, num_warps=4, **EXACT
        )
    if not torch.isfinite(absmax).all():
        raise ValueError("quantize needs finite weights, found NaN or infinity")
    code = shared_map(codebook(quant_type), device)
    q = quant.QuantizedTensor(packed, code, absmax, blocksize, tuple(weight.shape), weight.dtype, quant_type)
    return double_quantize(q) if double_quant else q


@lru_cache
def _nearest(quant_type: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """quant.blockwise.nearest_table, as long as the kernel wants it."""
    midpoints, indices = nearest_table(codebook(quant_type))
    missing = 15 - len(midpoints)  # fp4 and int4 have two zeros
    midpoints = torch.nn.functional.pad(midpoints, (0, missing), value=float("inf"))
    return midpoints.to(device), torch.nn.functional.pad(indices, (0, missing)).int().to(device)
