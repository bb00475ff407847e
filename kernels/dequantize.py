"""dequantize: QuantizedTensor → float weight, ŵ = code[index] · absmax.

Every backend must equal quant.dequantize to the bit.

The reference here differs from the definition only in how it looks up: a byte holds two codes, so a table of 256
pairs gives two weights for one lookup. A pair of fp32 is moved as one 8-byte element (its bits are never read as a
number), which index_select does about five times faster than unpacking nibbles.
"""

from functools import lru_cache

import torch
from torch import Tensor

from quant import QuantizedTensor

from .buffers import fresh
from .dispatch import backend_for, implementation, register

CHUNK = 1 << 20  # bytes of codes looked up at a time: bounds the fp32 temporary to 8 MB


def dequantize(q: QuantizedTensor, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """The weight, shape q.shape, in `dtype` (q.dtype by default), or written into `out` and in its dtype.

    Raises ValueError when `out` has another shape, is not contiguous, or contradicts `dtype`.
    """
    if out is None:
        out = fresh(q.shape, dtype or q.dtype, q.device)
    elif tuple(out.shape) != q.shape or not out.is_contiguous() or dtype not in (None, out.dtype):
        raise ValueError(
            f"out must be contiguous, of shape {q.shape} and dtype {dtype or out.dtype}, "
            f"got {tuple(out.shape)} {out.dtype}"
        )
    implementation("dequantize", backend_for("dequantize", q.device, q, out))(q, out)
    return out


@register("dequantize", "reference")
def dequantize_reference(q: QuantizedTensor, out: Tensor) -> None:
    """Fill `out` (contiguous, q.shape) by the pair table, a chunk of whole blocks at a time."""
    codes_per_byte = 2 if len(q.code) == 16 else 1
    table = _pairs(q.code) if codes_per_byte == 2 else q.code
    scales = q.scales()
    flat = out.view(-1)
    chunk = max(CHUNK, q.blocksize)
    for start in range(0, q.packed.numel(), chunk):
        looked_up = table.index_select(0, q.packed[start : start + chunk].int()).view(torch.float32)
        first = start * codes_per_byte
        values = looked_up[: q.numel - first]  # an odd weight count leaves half a byte over
        _scale_blocks(values, scales[first // q.blocksize :], q.blocksize)
        flat[first : first + values.numel()] = values


def _scale_blocks(values: Tensor, scales: Tensor, blocksize: int) -> None:
    """values[i] ·= scales[i // blocksize], in place; the last block may be short."""
    n_full = values.numel() // blocksize
    full = values[: n_full * blocksize].view(n_full, blocksize)
    full.mul_(scales[:n_full, None])
    values[n_full * blocksize :].mul_(scales[n_full : n_full + 1])


def _pairs(code: Tensor) -> Tensor:
    """The two values of every byte, (256,), each pair of fp32 seen as one float64."""
    return _pairs_of(tuple(code.tolist()), code.device)


@lru_cache
def _pairs_of(levels: tuple[float, ...], device: torch.device) -> Tensor:
    code = torch.tensor(levels, dtype=torch.float32, device=device)
    byte = torch.arange(256, device=device)
    return torch.stack([code[byte >> 4], code[byte & 15]], dim=1).view(torch.float64).view(-1)
