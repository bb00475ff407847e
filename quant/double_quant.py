"""Double quantization: the scales of the first level are themselves quantized, to 8 bits (QLoRA, §3).

    offset      = mean(absmax)                        scales are positive: centring uses both signs of the map
    absmax2_j   = max |absmax - offset| over block j of 256 scales
    index       = nearest level of the signed dynamic map to (absmax - offset) · (1 / absmax2_j), ties to the even index
    absmax'     = absmax_code[index] · absmax2_j + offset        two fp32 roundings

It turns 32/64 = 0.5 bits of scale a weight into 8/64 + 32/(64·256) = 0.127. The paper calls the 8-bit type FP8; what
bitsandbytes ships, and this is, is the dynamic map. The mean is summed in float64 in index order, since an fp32
torch.mean changes with the number of threads. Nearest is exact; bitsandbytes' CPU uses an approximate table, so its
8-bit codes can be off by one level (its files are read exactly: only the writing differs).
"""

import torch
from torch import Tensor

BLOCKSIZE2 = 256


def quantize_absmax(absmax: Tensor, absmax_code: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 (n_blocks,) → (absmax_8bit uint8 (n_blocks,), absmax2 fp32 (⌈n_blocks/256⌉,), absmax_offset fp32 ())."""
    in_order = absmax.cpu().double().cumsum(0)
    offset = (in_order[-1] / absmax.numel()).float().to(absmax.device)
    absmax_8bit, absmax2 = quantize_8bit(absmax - offset, absmax_code)
    return absmax_8bit, absmax2, offset


def dequantize_absmax(
    absmax_8bit: Tensor, absmax_code: Tensor, absmax2: Tensor, absmax_offset: Tensor, blocksize2: int = BLOCKSIZE2
) -> Tensor:
    """absmax_code[absmax_8bit] · absmax2 + absmax_offset: fp32 (n_blocks,)."""
    scale = absmax2.repeat_interleave(blocksize2)[: absmax_8bit.numel()]
    return absmax_code[absmax_8bit.int()] * scale + absmax_offset


def quantize_8bit(values: Tensor, code: Tensor, blocksize: int = BLOCKSIZE2) -> tuple[Tensor, Tensor]:
    """Blockwise to the nearest of 256 sorted levels: fp32 (n,) → (uint8 (n,), absmax fp32 (⌈n / blocksize⌉,))."""
    n = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -n % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    inverse = 1 / absmax
    representable = torch.isfinite(inverse)
    scaled = blocks * torch.where(representable, inverse, 0)[:, None]
    indices = nearest_even(scaled.view(-1)[:n], code)
    return indices, torch.where(representable, absmax, 0)


def nearest_even(scaled: Tensor, code: Tensor) -> Tensor:
    """Index of the nearest of sorted levels, a tie to the even index: fp32 (n,) → uint8 (n,)."""
    scaled, code = scaled.double(), code.double()  # differences of fp32 numbers, so that a tie is a tie
    upper = torch.searchsorted(code, scaled).clamp(1, len(code) - 1)
    lower = upper - 1
    to_lower, to_upper = scaled - code[lower], code[upper] - scaled
    take_upper = (to_upper < to_lower) | ((to_upper == to_lower) & (upper % 2 == 0))
    return torch.where(take_upper, upper, lower).to(torch.uint8)
