"""Exercise 1: round fp32 to bf16, by its bits. Notebook: 01_sixteen_bits.ipynb. Grade: qlora grade 1"""

import torch
from torch import Tensor


def round_to_bf16(x: Tensor) -> Tensor:
    """The sixteen bits of the bf16 number that is nearest to each x, as integers.

    x: fp32, any shape → int32 of the same shape, each between 0 and 0xFFFF.

    - A bf16 is the upper half of an fp32: 1 sign, 8 exponent and 7 fraction bits.
    - Round to the nearest. A tie (lower half exactly 0x8000) goes to the even one: the bf16 whose last bit is 0.
    - What rounds past the largest bf16 becomes infinity. Infinity stays infinity.
    - NaN becomes 0x7FC0, whatever its sign and payload were.

    Not to be used: torch's own conversion (.to(torch.bfloat16), .bfloat16(), torch.bfloat16 in any form).
    """
    # the exercise: this part is the reader's to write, and `qlora grade 1` says so until it is
    raise NotImplementedError("read the bits with x.view(torch.int32), round, and keep the upper half")
