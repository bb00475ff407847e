"""Code books: the few values a quantized weight may take, each fp32, derived here and not pasted.

NormalFloat (NFk): if weights are N(0, σ²), dividing a block by its absmax gives values in [-1, 1], and the best
spread of 2^k levels follows the quantiles Q of N(0, 1) (QLoRA, arXiv 2305.14314, §3). With δ the probability left
outside at each end,

    positive half: Q(linspace(1-δ, 1/2, 2^(k-1) + 1)) without its last point      2^(k-1) levels
    zero:          0, exactly, so that padding and pruned weights cost no error   1 level
    negative half: -Q(linspace(1-δ, 1/2, 2^(k-1))) without its last point         2^(k-1) - 1 levels
    all divided by the largest, so that the ends are ±1

    1-δ = 1 - (1/2^(k+1) + 1/(2^(k+1) - 2)) / 2

Done otherwise than the paper's eq. (4), which averages neighbouring quantiles: this is what bitsandbytes ships, and
files must agree to the bit. So must two roundings of its generator: 1-δ is kept to 7 decimals (0.9677083 for k = 4)
and the linspace is fp32.

The 8-bit dynamic map (Dettmers, arXiv 2110.02861; 1511.04561) has a sign, a unary exponent and a linear
fraction, so that it covers seven decades; it stores the scales in double quantization, and Adam's state.
"""

from functools import lru_cache
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

MIN_NF_BITS, MAX_NF_BITS = 2, 8


def _linspace_fp32(start: float, end: float, n: int) -> list[float]:
    """torch.linspace's n fp32 points, the same on every machine: from the nearer end each, rounded once."""
    first, last = np.float32(start), np.float32(end)
    step = float((last - first) / np.float32(n - 1))
    from_first = [float(first) + step * i for i in range(n // 2)]
    from_last = [float(last) - step * (n - 1 - i) for i in range(n // 2, n)]
    return [float(np.float32(x)) for x in from_first + from_last]


@lru_cache
def nfk_codebook(bits: int) -> Tensor:
    """NormalFloat levels for `bits` bits, ascending: fp32 (2^bits,). The tensor is shared: do not write to it.

    Raises ValueError unless 2 ≤ bits ≤ 8.
    """
    if not MIN_NF_BITS <= bits <= MAX_NF_BITS:
        raise ValueError(f"NormalFloat needs between {MIN_NF_BITS} and {MAX_NF_BITS} bits, got {bits}")
    quantile = NormalDist().inv_cdf
    half = 2 ** (bits - 1)
    offset = round(1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2, 7)
    positive = [quantile(p) for p in _linspace_fp32(offset, 0.5, half + 1)[:-1]]
    negative = [-quantile(p) for p in _linspace_fp32(offset, 0.5, half)[:-1]]
    levels = torch.tensor(sorted([*negative, 0.0, *positive]), dtype=torch.float32)
    return levels / levels.max()


def nf4_codebook() -> Tensor:
    """The sixteen NF4 levels, ascending from -1 to 1 with 0 at index 7: fp32 (16,)."""
    return nfk_codebook(4)


@lru_cache
def fp4_codebook() -> Tensor:
    """FP4 (1 sign, 2 exponent, 1 fraction bit) divided by its largest value, in bitsandbytes' index order: fp32 (16,).

    The index is the bit pattern `s e e m`. Its decoder reads the fields in an order of its own, so the values are not
    sorted: 0, 1/16, 8, 12, 4, 6, 2, 3, over 12. Index 8 is -0, equal to index 0 by value.
    """
    magnitudes = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=torch.float32)
    return torch.cat([magnitudes, -magnitudes]) / 12


@lru_cache
def int4_codebook() -> Tensor:
    """Symmetric INT4, k/7 for k = 7 … 0, -0 … -7, in bitsandbytes' index order: fp32 (16,)."""
    magnitudes = torch.arange(7, -1, -1, dtype=torch.float32)
    return torch.cat([magnitudes, -magnitudes.flip(0)]) / 7


def codebook(quant_type: str) -> Tensor:
    """The code book of a quant_type (nf4, fp4, int4, nf2 … nf8): fp32 (2^bits,). Raises ValueError for other names."""
    if quant_type == "fp4":
        return fp4_codebook()
    if quant_type == "int4":
        return int4_codebook()
    bits = quant_type.removeprefix("nf")
    if quant_type.startswith("nf") and bits in {"2", "3", "4", "5", "6", "7", "8"}:
        return nfk_codebook(int(bits))
    raise ValueError(f"quant_type must be nf4, fp4, int4 or nf2 … nf8, got {quant_type!r}")


@lru_cache
def dynamic_map(signed: bool = True) -> Tensor:
    """The 256 levels of the 8-bit dynamic data type, ascending: fp32 (256,).

    Decade e = 10^(i-6), i = 0 … 6, holds 2^i levels a sign (2^(i+1) when unsigned): the centres of equal steps of
    [0.1, 1]. With 0 and 1.0 added there is no -1.0: an element equal to -absmax comes back 0.7% small.
    """
    levels = [0.0, 1.0]
    for i in range(7):
        n_levels = 2**i if signed else 2 ** (i + 1)
        boundaries = torch.tensor(_linspace_fp32(0.1, 1.0, n_levels + 1), dtype=torch.float32)
        centres = (boundaries[:-1] + boundaries[1:]) / 2 * 10 ** (i - 6)
        levels += centres.tolist()
        if signed:
            levels += (-centres).tolist()
    return torch.tensor(sorted(levels), dtype=torch.float32)
