"""Blockwise quantization: one scale for each block of consecutive weights, the nearest code for each weight.

    absmax_b = max |w| over block b                   scale, fp32
    s        = w · (1 / absmax_b)                     in [-1, 1]; a product with the reciprocal, in fp32
    index    = how many midpoints of the sorted code book lie strictly below s     (a tie goes to the lower code)
    ŵ        = code[index] · absmax_b                 fp32, rounded once to the output dtype

(QLoRA, arXiv 2305.14314, eqs. 1 and 2.) The weight is read as one row-major line: blocks cross the ends of rows, and
the last block may be shorter, with its own absmax. An all-zero block, or one so small that 1/absmax overflows, stores
absmax 0 and the code of 0. These rules are bitsandbytes', to the bit; where its own back ends differ from one another
(its CPU divides in the last, short block, and stores 1e-38 there for zeros) the rule above holds throughout.
"""

from dataclasses import replace

import torch
from torch import Tensor

from .codebook import codebook, dynamic_map
from .double_quant import BLOCKSIZE2, quantize_absmax
from .tensor import QuantizedTensor, shared_map

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
CHUNK = 1 << 22  # weights quantized at a time: bounds the temporaries to tens of megabytes


def quantize(
    weight: Tensor, *, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True
) -> QuantizedTensor:
    """Quantize a weight of any shape and float dtype.

    quant_type: nf4, fp4, int4 or nf2 … nf8. 4-bit codes are packed two a byte, other widths are stored one a byte.
    Raises ValueError for an unknown quant_type or blocksize, a dtype that is not floating point, an empty weight, or
    one that holds NaN or infinity.
    """
    code = codebook(quant_type)
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {blocksize}")
    if not weight.is_floating_point():
        raise ValueError(f"quantize needs a floating point weight, got {weight.dtype}")
    if weight.numel() == 0:
        raise ValueError(f"quantize needs at least one weight, got shape {tuple(weight.shape)}")

    flat = weight.detach().reshape(-1)
    code = shared_map(code, flat.device)
    indices = torch.empty(flat.numel(), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-flat.numel() // blocksize), dtype=torch.float32, device=flat.device)
    for start in range(0, flat.numel(), CHUNK):
        stop = min(start + CHUNK, flat.numel())
        blocks = slice(start // blocksize, -(-stop // blocksize))
        indices[start:stop], absmax[blocks] = _quantize_chunk(flat[start:stop].float(), code, blocksize)

    zero = int(nearest_code(torch.zeros(1, device=flat.device), code))
    q = QuantizedTensor(
        packed=pack(indices, zero) if len(code) == 16 else indices,
        code=code,
        absmax=absmax,
        blocksize=blocksize,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
        quant_type=quant_type,
    )
    return double_quantize(q) if double_quant else q


def double_quantize(q: QuantizedTensor) -> QuantizedTensor:
    """The same weight with its absmax quantized in turn. q holds plain absmax."""
    absmax_code = shared_map(dynamic_map(signed=True), q.device)
    absmax_8bit, absmax2, absmax_offset = quantize_absmax(q.scales(), absmax_code)
    return replace(
        q,
        absmax=None,
        absmax_8bit=absmax_8bit,
        absmax_code=absmax_code,
        absmax2=absmax2,
        absmax_offset=absmax_offset,
        blocksize2=BLOCKSIZE2,
    )


def _quantize_chunk(values: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """values fp32 (n,) → (uint8 indices (n,), fp32 absmax (⌈n / blocksize⌉,))."""
    n = values.numel()
    padding = -n % blocksize
    blocks = torch.nn.functional.pad(values, (0, padding)).view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    if not torch.isfinite(absmax).all():
        raise ValueError("quantize needs finite weights, found NaN or infinity")
    inverse = 1 / absmax
    representable = torch.isfinite(inverse)
    scaled = blocks * torch.where(representable, inverse, 0)[:, None]
    return nearest_code(scaled.view(-1)[:n], code), torch.where(representable, absmax, 0)


def nearest_code(scaled: Tensor, code: Tensor) -> Tensor:
    """Index of the nearest level, a tie to the lower one: fp32 (n,) → uint8 (n,).

    The code book need not be sorted. Of equal levels (±0) the one with the lowest index is used.
    """
    midpoints, index_of_level = nearest_table(code)
    return index_of_level[torch.bucketize(scaled, midpoints, out_int32=True)]


def nearest_table(code: Tensor) -> tuple[Tensor, Tensor]:
    """What `nearest_code` looks up, of L distinct levels: midpoints fp32 (L-1,), ascending, and indices uint8 (L,)."""
    levels = torch.unique(code)  # sorted
    index_of_level = (code[None, :] == levels[:, None]).int().argmax(dim=1).to(torch.uint8)
    return (levels[:-1] + levels[1:]) / 2, index_of_level


def pack(indices: Tensor, zero: int) -> Tensor:
    """Two 4-bit indices a byte, the first in the high nibble: uint8 (n,) → uint8 (⌈n/2⌉,).

    An odd n leaves one low nibble over: it holds `zero`, the index of the level 0.
    """
    if indices.numel() % 2:
        indices = torch.nn.functional.pad(indices, (0, 1), value=zero)
    return (indices[0::2] << 4) | indices[1::2]


def unpack(packed: Tensor, n: int) -> Tensor:
    """The n indices of `pack`: uint8 (⌈n/2⌉,) → uint8 (n,)."""
    return torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:n]


def dequantize(q: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """ŵ = code[index] · absmax, in fp32, rounded once to `dtype` (q.dtype by default). Returns shape q.shape."""
    indices = unpack(q.packed, q.numel) if len(q.code) == 16 else q.packed
    scale_of_weight = q.scales().repeat_interleave(q.blocksize)[: q.numel]
    weight = q.code[indices.int()] * scale_of_weight
    return weight.to(dtype or q.dtype).view(q.shape)
