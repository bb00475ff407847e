"""Which arrays AdamW keeps for a parameter: two moments, in floating point or in blocks of 8 bits.

    32 bits   exp_avg, exp_avg_sq              fp32 (n,); fp64 for an fp64 parameter          8 bytes an element
    8 bits    exp_avg, exp_avg_sq              codes uint8 (n,)
              exp_avg_absmax, exp_avg_sq_absmax   fp32 (⌈n / 256⌉,)                            2 + 8/256 bytes

A parameter of fewer than 4096 elements keeps 32 bits, as in bitsandbytes: biases and the gains of norms are few, and
a code's error weighs more in them. What the codes mean is in kernels/adamw.py. bitsandbytes' CPU rounds by an
approximate table where this takes the exact nearest code, so their states differ by a code here and there.
"""

import torch
from torch import Tensor

from kernels.adamw import STATE_BLOCK

from .layout import Field

MIN_8BIT = 4096  # elements
STATE_BITS = (32, 8)


def state_fields(parameter: Tensor, state_bits: int) -> tuple[Field, ...]:
    """The fields of a parameter's state, in the order in which the kernels take them."""
    if state_bits == 8 and parameter.numel() >= MIN_8BIT and parameter.dtype != torch.float64:
        codes = [Field(name, torch.uint8) for name in ("exp_avg", "exp_avg_sq")]
        scales = [Field(f"{code.name}_absmax", torch.float32, per=STATE_BLOCK) for code in codes]
        return codes[0], scales[0], codes[1], scales[1]
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return Field("exp_avg", dtype), Field("exp_avg_sq", dtype)


def is_8bit(fields: tuple[Field, ...]) -> bool:
    return len(fields) == 4
