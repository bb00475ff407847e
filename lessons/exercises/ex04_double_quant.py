"""Exercise 4: quantize the scales. Notebook: 04_double_quant.ipynb. Grade: qlora grade 4"""

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
    # the exercise: this part is the reader's to write, and `qlora grade 4` says so until it is
    raise NotImplementedError("subtract the mean, scale blocks of 256, find the nearest of 256 levels")


def restore(absmax_8bit: Tensor, absmax2: Tensor, absmax_offset: Tensor) -> Tensor:
    """The scales again, fp32 (n,): the level of each index times its block's absmax2, plus absmax_offset."""
    # the exercise: this part is the reader's to write, and `qlora grade 4` says so until it is
    raise NotImplementedError("look up the levels, multiply by absmax2, add the offset")
