"""Solution 4: quantize the scales. Notebook: 04_double_quant.ipynb. Grade: qlora grade 4"""

import torch
from torch import Tensor

from quant import dynamic_map

BLOCKSIZE2 = 256


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(absmax_8bit, absmax2, absmax_offset): the scales of a weight, in 8 bits each.

    absmax fp32 (n,) → absmax_8bit uint8 (n,), absmax2 fp32 (⌈n/256⌉,), absmax_offset fp32 ().

    - absmax_offset: the mean of absmax, summed in float64 and rounded to fp32 once.
    - Blocks of 256 consecutive scales; the last may be shorter. absmax2: the largest |absmax - absmax_offset| of each.
    - absmax_8bit: the index of the nearest of the 256 sorted levels of dynamic_map(signed=True) to
      (absmax - absmax_offset) · (1 / absmax2), in fp32. Where absmax2 is 0, that of level 0.

    Not to be used: quant.quantize and what quant.double_quant holds.
    """
    code = dynamic_map(signed=True)
    offset = absmax.double().mean().float()
    centred = absmax - offset
    blocks = torch.nn.functional.pad(centred, (0, -len(centred) % BLOCKSIZE2)).view(-1, BLOCKSIZE2)
    absmax2 = blocks.abs().amax(dim=1)
    scaled = blocks * torch.where(absmax2 > 0, 1 / absmax2, 0)[:, None]
    distances = (scaled.double()[..., None] - code.double()).abs()
    return distances.argmin(-1).view(-1)[: len(absmax)].to(torch.uint8), absmax2, offset


def restore(absmax_8bit: Tensor, absmax2: Tensor, absmax_offset: Tensor) -> Tensor:
    """The scales again, fp32 (n,): the level of each index times its block's absmax2, plus absmax_offset."""
    scale = absmax2.repeat_interleave(BLOCKSIZE2)[: len(absmax_8bit)]
    return dynamic_map(signed=True)[absmax_8bit.int()] * scale + absmax_offset
