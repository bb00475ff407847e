"""Exercise 3: NF4 in blocks, packed, against quant.quantize to the bit."""

from collections.abc import Callable

import torch
from torch import Tensor

from lessons.grading import Case, Forbidden, Mistake
from quant import nf4_codebook, quantize

TITLE = "quantize to NF4 and pack two codes a byte"
VERSION = 1
MUST_NOT_USE = (
    Forbidden(".quantize", "it is what you are writing"),
    Forbidden("kernels", "it holds what you are writing"),
)

SWAPPED = "the nibbles are swapped: the first of two indices goes into the high nibble, index << 4"
TIE_UP = (
    "a tie goes to the upper level: a scaled value equal to a midpoint takes the lower one (strictly greater passes it)"
)
DISTANCE = (
    "the nearest level was found by distances, |scaled - code|, which are rounded: compare with the midpoints, in fp32"
)
DIVIDED = "w was divided by absmax: take the reciprocal first, w · (1 / absmax); both are rounded, and they differ"
SIGNED = "absmax is the largest w, and should be the largest |w|"
ONE_SCALE = "one absmax was used for the whole weight: each block has its own"
BLOCK_OF_ROW = "a scale was taken for each row: blocks run on over the ends of rows"
NAN_TOP = "0 · (1/0) is NaN, and NaN became index 15: a block of zeros takes the index of level 0, which is 7"
NAN_BOTTOM = "0 · (1/0) is NaN, and NaN became index 0: a block of zeros takes the index of level 0, which is 7"
LEFT_OVER = "the nibble left over at the end holds 0, which is the level -1: it must hold 7, the level 0"
Rule = Callable[[Tensor], Tensor]


def by_midpoints(scaled: Tensor) -> Tensor:
    return torch.bucketize(scaled, (nf4_codebook()[:-1] + nf4_codebook()[1:]) / 2)


def ties_up(scaled: Tensor) -> Tensor:
    return torch.bucketize(scaled, (nf4_codebook()[:-1] + nf4_codebook()[1:]) / 2, right=True)


def by_distance(scaled: Tensor) -> Tensor:
    return (scaled[..., None] - nf4_codebook()).abs().argmin(-1)


def attempt(
    weight: Tensor,
    blocksize: int,
    *,
    index: Rule = by_midpoints,
    largest: Rule = lambda blocks: blocks.abs().amax(1),
    scale: Callable[[Tensor, Tensor], Tensor] = lambda w, absmax: w * torch.where(absmax > 0, 1 / absmax, 0),
    swapped: bool = False,
    left_over: int = 7,
) -> tuple[Tensor, Tensor]:
    """What quantize gives when one of its rules is replaced."""
    flat = weight.reshape(-1)
    n = flat.numel()
    blocks = torch.nn.functional.pad(flat, (0, -n % blocksize)).view(-1, blocksize)
    absmax = largest(blocks)
    indices = index(scale(blocks, absmax[:, None])).view(-1)[:n].to(torch.uint8)
    if n % 2:
        indices = torch.cat([indices, torch.tensor([left_over], dtype=torch.uint8)])
    first, second = (indices[1::2], indices[0::2]) if swapped else (indices[0::2], indices[1::2])
    return first << 4 | second, absmax


def mistakes(weight: Tensor, blocksize: int) -> list[Mistake]:
    def made(hint: str, **rules) -> Mistake:
        return Mistake(hint, attempt(weight, blocksize, **rules))

    n = weight.numel()
    whole = attempt(weight, n, left_over=7) if n % 2 == 0 else attempt(weight, n + 1)
    return [
        made(SWAPPED, swapped=True),
        made(TIE_UP, index=ties_up),
        made(DISTANCE, index=by_distance),
        made(DIVIDED, scale=lambda w, absmax: torch.where(absmax > 0, w / absmax, 0)),
        made(SIGNED, largest=lambda blocks: blocks.amax(1)),
        made(NAN_TOP, scale=lambda w, absmax: w * (1 / absmax)),
        made(NAN_BOTTOM, scale=lambda w, absmax: (w * (1 / absmax)).nan_to_num(-1)),
        made(LEFT_OVER, left_over=0),
        Mistake(ONE_SCALE, whole),
        Mistake(ONE_SCALE, (whole[0], whole[1].expand(-(-n // blocksize)))),
        *([Mistake(BLOCK_OF_ROW, attempt(weight, weight.shape[1]))] if weight.dim() == 2 else []),
    ]


def at_thresholds() -> Tensor:
    """Two blocks whose scaled values are the 15 midpoints; in the second absmax is a power of two."""
    midpoints = (nf4_codebook()[:-1] + nf4_codebook()[1:]) / 2
    block = torch.cat([midpoints, torch.tensor([1.0]), midpoints, torch.tensor([-1.0])])
    return torch.cat([block, block.flip(0), block * 4, block.flip(0) * 4])


def where_division_differs() -> Tensor:
    """Blocks of 64 in which w · (1/absmax) and w / absmax lie on two sides of a midpoint."""
    generator = torch.Generator().manual_seed(3)
    midpoints = (nf4_codebook()[:-1] + nf4_codebook()[1:]) / 2
    absmax = torch.rand(4000, 1, generator=generator) + 0.5
    w = midpoints * absmax
    differ = by_midpoints(w * (1 / absmax)) != by_midpoints(w / absmax)
    rows = differ.any(1).nonzero().view(-1)[:3]
    blocks = torch.zeros(len(rows), 64)
    blocks[:, :15] = torch.where(differ[rows], w[rows], 0)
    blocks[:, 63] = -absmax[rows, 0]
    return blocks


def cases() -> list[Case]:
    generator = torch.Generator().manual_seed(33)
    zeros = torch.randn(3, 64, generator=generator)
    zeros[1] = 0
    inputs = [
        ("one block of 64", torch.randn(64, generator=generator), 64),
        ("a weight (6, 96): blocks run over the ends of rows", torch.randn(6, 96, generator=generator), 64),
        ("blocks of 128", torch.randn(4, 128, generator=generator) * 3, 128),
        ("values at the midpoints", at_thresholds(), 64),
        ("a product with the reciprocal", where_division_differs(), 64),
        ("a block of zeros", zeros, 64),
        ("a tail of 37: 101 elements", torch.randn(101, generator=generator), 64),
    ]
    found = []
    for name, weight, blocksize in inputs:
        q = quantize(weight, blocksize=blocksize, double_quant=False)
        arguments = (weight, blocksize)
        found.append(
            Case(
                name,
                lambda student, arguments=arguments: student("quantize_nf4", *arguments),
                (q.packed, q.absmax),
                mistakes(weight, blocksize),
            )
        )
    return found
