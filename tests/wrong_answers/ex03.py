import torch
from torch import Tensor

from quant import nf4_codebook

from . import Wrong

MIDPOINTS = (nf4_codebook()[:-1] + nf4_codebook()[1:]) / 2
Answer = tuple[Tensor, Tensor]


def finished(
    weight: Tensor, blocksize: int, *, right: bool = False, swap: bool = False, divide: bool = False
) -> Answer:
    """One right answer, spoilt on request; not the check's code."""
    packed, scales = [], []
    codes: list[int] = []
    for block in weight.reshape(-1).split(blocksize):
        largest = block.abs().max()
        scales.append(largest)
        inverse = 1 / largest if largest > 0 else torch.tensor(0.0)
        scaled = block / largest if divide and largest > 0 else block * inverse
        codes += torch.bucketize(scaled, MIDPOINTS, right=right).tolist()
    codes += [7] * (len(codes) % 2)
    for a, b in zip(codes[::2], codes[1::2], strict=True):
        packed.append(b << 4 | a if swap else a << 4 | b)
    return torch.tensor(packed, dtype=torch.uint8), torch.stack(scales)


def ties_up(weight: Tensor, blocksize: int = 64) -> Answer:
    return finished(weight, blocksize, right=True)


def nibbles_swapped(weight: Tensor, blocksize: int = 64) -> Answer:
    return finished(weight, blocksize, swap=True)


def divided(weight: Tensor, blocksize: int = 64) -> Answer:
    return finished(weight, blocksize, divide=True)


def whole_line(weight: Tensor, blocksize: int, largest: Tensor, code: Tensor | None = None) -> Answer:
    flat = torch.nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % blocksize)).view(-1, blocksize)
    scaled = flat * (1 / largest)[:, None]
    codes = torch.bucketize(scaled, MIDPOINTS) if code is None else (scaled[..., None] - code).abs().argmin(-1)
    codes = codes.view(-1)[: weight.numel() + weight.numel() % 2].to(torch.uint8)
    return codes[::2] << 4 | codes[1::2], largest


def absmax_of(weight: Tensor, blocksize: int) -> Tensor:
    return torch.stack([block.abs().max() for block in weight.reshape(-1).split(blocksize)])


def largest_not_magnitude(weight: Tensor, blocksize: int = 64) -> Answer:
    return whole_line(weight, blocksize, torch.stack([b.max() for b in weight.reshape(-1).split(blocksize)]))


def by_distance(weight: Tensor, blocksize: int = 64) -> Answer:
    return whole_line(weight, blocksize, absmax_of(weight, blocksize), nf4_codebook())


def zeros_unguarded(weight: Tensor, blocksize: int = 64) -> Answer:
    return whole_line(weight, blocksize, absmax_of(weight, blocksize))


def one_scale(weight: Tensor, blocksize: int = 64) -> Answer:
    n_blocks = -(-weight.numel() // blocksize)
    return whole_line(weight, blocksize, weight.abs().max().expand(n_blocks))


def tail_padded(weight: Tensor, blocksize: int = 64) -> Answer:
    return finished(torch.nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % blocksize)), blocksize)


def zero_left_over(weight: Tensor, blocksize: int = 64) -> Answer:
    packed, absmax = finished(weight, blocksize)
    if weight.numel() % 2:
        packed[-1] &= 0xF0
    return packed, absmax


WRONG = [
    Wrong("the nibbles are swapped", {"quantize_nf4": nibbles_swapped}),
    Wrong("a tie goes to the upper level", {"quantize_nf4": ties_up}),
    Wrong("take the reciprocal first", {"quantize_nf4": divided}),
    Wrong("the largest w, and should be the largest |w|", {"quantize_nf4": largest_not_magnitude}),
    Wrong("was found by distances", {"quantize_nf4": by_distance}),
    Wrong("NaN became index 15", {"quantize_nf4": zeros_unguarded}),
    Wrong("one absmax was used for the whole weight", {"quantize_nf4": one_scale}),
    Wrong("must have shape (51,), got (64,)", {"quantize_nf4": tail_padded}),
    Wrong("the nibble left over at the end holds 0", {"quantize_nf4": zero_left_over}),
]
