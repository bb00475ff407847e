"""Exercise 4: double quantization, against quant.double_quant to the bit."""

import torch
from torch import Tensor

from lessons.grading import Case, Forbidden, Mistake
from quant import dynamic_map
from quant.double_quant import dequantize_absmax, quantize_8bit, quantize_absmax

TITLE = "double quantization: the scales in 8 bits"
VERSION = 1
MUST_NOT_USE = tuple(
    Forbidden(name, "it is what you are writing")
    for name in (".quantize", ".quantize_absmax", ".quantize_8bit", ".nearest_even", ".dequantize_absmax", "kernels")
)

NOT_CENTRED = (
    "the mean was not subtracted: scales are positive, and half of a signed map would stay unused. Quantize "
    "absmax - offset"
)
UNSIGNED = "the unsigned map was used: centred scales are negative, too: dynamic_map(signed=True)"
BLOCKS_OF_64 = "blocks of 64 scales were used, as for weights: the second level has blocks of 256"
ONE_BLOCK = "one absmax2 was used for all scales: each 256 have their own"
FLOORED = "each scale went to the level below it and not to the nearest: compare the distances to both neighbours"
FP32_MEAN = (
    "the mean was summed in fp32, whose last bit depends on the order of the sum: absmax.double().mean().float()"
)
NO_OFFSET = "absmax_offset was not added back"
OFFSET_SCALED = "absmax_offset was multiplied by absmax2: it is added after the product"


def attempt(absmax: Tensor, *, offset: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    indices, absmax2 = quantize_8bit(absmax - offset, code, blocksize)
    return indices, absmax2, offset


def floored(absmax: Tensor, offset: Tensor, code: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _, absmax2 = quantize_8bit(absmax - offset, code)
    scale = (1 / absmax2).repeat_interleave(256)[: len(absmax)]
    below = torch.bucketize((absmax - offset) * scale, code, right=True) - 1
    return below.clamp(min=0).to(torch.uint8), absmax2, offset


def mistakes(absmax: Tensor) -> list[Mistake]:
    code, zero = dynamic_map(signed=True), torch.zeros(())
    _, _, offset = quantize_absmax(absmax, code)
    values = [
        (NOT_CENTRED, attempt(absmax, offset=zero, code=code, blocksize=256)),
        (NOT_CENTRED, (*attempt(absmax, offset=zero, code=code, blocksize=256)[:2], offset)),
        (UNSIGNED, attempt(absmax, offset=offset, code=dynamic_map(signed=False), blocksize=256)),
        (BLOCKS_OF_64, attempt(absmax, offset=offset, code=code, blocksize=64)),
        (ONE_BLOCK, attempt(absmax, offset=offset, code=code, blocksize=len(absmax))),
        (FLOORED, floored(absmax, offset, code)),
        (FP32_MEAN, lambda got: got[2] != offset and torch.allclose(got[2], offset)),
    ]
    return [Mistake(hint, value) for hint, value in values]


def cases() -> list[Case]:
    generator = torch.Generator().manual_seed(4)
    weights = {"256 scales": 256, "1000 scales: four blocks, the last one short": 1000, "three scales": 3}
    code, found = dynamic_map(signed=True), []
    for name, n in weights.items():
        absmax = torch.randn(n, 64, generator=generator).abs().amax(1)
        parts = quantize_absmax(absmax, code)
        found.append(Case(name, _call("double_quantize", absmax), parts, mistakes(absmax)))
        restored = dequantize_absmax(parts[0], code, parts[1], parts[2])
        scale = parts[1].repeat_interleave(256)[:n]
        level = code[parts[0].int()]
        wrong = [Mistake(NO_OFFSET, level * scale), Mistake(OFFSET_SCALED, (level + parts[2]) * scale)]
        found.append(Case(f"restore, {name}", _call("restore", *parts), restored, wrong))
    equal = torch.full((300,), 0.75)
    found.append(Case("300 equal scales", _call("double_quantize", equal), quantize_absmax(equal, code)))
    return found


def _call(name: str, *arguments: Tensor):
    return lambda student: student(name, *arguments)
