"""Exercise 1: fp32 to bf16 by bit operations, against torch's own conversion."""

import torch
from torch import Tensor

from lessons.grading import Case, Forbidden, Mistake

TITLE = "round fp32 to bf16, to nearest even"
VERSION = 1
MUST_NOT_USE = (Forbidden(".bfloat16", "work on the bits: x.view(torch.int32)"),)

TRUNCATED = "the lower half is cut off: 1.999 becomes 1.992, always towards zero. Add before you shift"
HALF_UP = (
    "ties go away from zero: adding 0x8000 rounds every tie up. An even upper half must keep its ties: add 0x7FFF, and "
    "1 more where the last kept bit is 1"
)
TO_ODD = "ties go to the odd neighbour: the 1 is added where the last kept bit is 0"
NAN_ROUNDED = "a NaN was rounded like a number: the addition runs out of its fraction, and 0x7FFFFFFF turns into -0"
NEGATIVE = "negative numbers come out below 0: >> copies the sign bit down. Keep sixteen bits with & 0xFFFF"


def expected(x: Tensor) -> Tensor:
    """torch's rounding, its bits as int32 0 … 0xFFFF; its NaN is 0x7FC0."""
    bits = x.to(torch.bfloat16).view(torch.int16).int() & 0xFFFF
    return torch.where(x.isnan(), 0x7FC0, bits)


def wrong(x: Tensor) -> list[Mistake]:
    bits = x.view(torch.int32)
    last = bits >> 16 & 1

    def upper(sum_: Tensor) -> Tensor:
        return torch.where(x.isnan(), 0x7FC0, sum_ >> 16 & 0xFFFF)

    signed = torch.where(x.isnan(), 0x7FC0, bits + 0x7FFF + last >> 16)
    values = {
        TRUNCATED: upper(bits),
        HALF_UP: upper(bits + 0x8000),
        TO_ODD: upper(bits + 0x8000 - last),
        NAN_ROUNDED: bits + 0x7FFF + last >> 16 & 0xFFFF,
        NEGATIVE: signed,
    }
    return [Mistake(hint, value) for hint, value in values.items()]


def cases() -> list[Case]:
    generator = torch.Generator().manual_seed(1)
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x40490000, 0x00008000, 0x00018000], dtype=torch.int32)
    largest = torch.tensor([3.3895e38, 3.4e38, torch.finfo(torch.float32).max, torch.inf, 1e-45, 0.0])
    nans = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
    inputs = {
        "positive numbers": torch.rand(1000, generator=generator) * 100,
        "negative numbers": -torch.rand(64, generator=generator),
        "ties": ties.view(torch.float32),
        "the largest, the smallest, infinity": torch.cat([largest, -largest]),
        "NaN": nans,
        "any bits, two dimensions": torch.randint(-(2**31), 2**31, (40, 50), generator=generator)
        .to(torch.int32)
        .view(torch.float32),
    }
    return [
        Case(name, lambda student, x=x: student("round_to_bf16", x), expected(x), wrong(x))
        for name, x in inputs.items()
    ]
