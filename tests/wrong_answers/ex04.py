import torch
from torch import Tensor

from quant import dynamic_map

from . import Wrong

Parts = tuple[Tensor, Tensor, Tensor]


def by_loops(absmax: Tensor, offset: Tensor, code: Tensor, blocksize: int = 256) -> Parts:
    """Scale by scale; not the check's code."""
    indices, scales = [], []
    for block in (absmax - offset).split(blocksize):
        scales.append(block.abs().max())
        scaled = block * (1 / scales[-1]) if scales[-1] > 0 else block * 0
        indices += [int((s.double() - code.double()).abs().argmin()) for s in scaled]
    return torch.tensor(indices, dtype=torch.uint8), torch.stack(scales), offset


def mean(absmax: Tensor) -> Tensor:
    return absmax.double().mean().float()


def not_centred(absmax: Tensor) -> Parts:
    return by_loops(absmax, torch.zeros(()), dynamic_map())


def unsigned(absmax: Tensor) -> Parts:
    return by_loops(absmax, mean(absmax), dynamic_map(signed=False))


def blocks_of_64(absmax: Tensor) -> Parts:
    return by_loops(absmax, mean(absmax), dynamic_map(), 64)


def one_block(absmax: Tensor) -> Parts:
    return by_loops(absmax, mean(absmax), dynamic_map(), len(absmax))


def level_below(absmax: Tensor) -> Parts:
    _, absmax2, offset = by_loops(absmax, mean(absmax), dynamic_map())
    scaled = (absmax - offset) * (1 / absmax2).repeat_interleave(256)[: len(absmax)]
    return (torch.searchsorted(dynamic_map(), scaled, right=True) - 1).clamp(0).to(torch.uint8), absmax2, offset


def summed_in_fp32(absmax: Tensor) -> Parts:
    total = torch.zeros(())
    for value in absmax:
        total = total + value
    return by_loops(absmax, total / len(absmax), dynamic_map())


def offset_forgotten(absmax_8bit: Tensor, absmax2: Tensor, absmax_offset: Tensor) -> Tensor:
    return dynamic_map()[absmax_8bit.int()] * absmax2.repeat_interleave(256)[: len(absmax_8bit)]


def offset_scaled(absmax_8bit: Tensor, absmax2: Tensor, absmax_offset: Tensor) -> Tensor:
    scale = absmax2.repeat_interleave(256)[: len(absmax_8bit)]
    return (dynamic_map()[absmax_8bit.int()] + absmax_offset) * scale


WRONG = [
    Wrong("the mean was not subtracted", {"double_quantize": not_centred}),
    Wrong("the unsigned map was used", {"double_quantize": unsigned}),
    Wrong("blocks of 64 scales were used", {"double_quantize": blocks_of_64}),
    Wrong("one absmax2 was used for all scales", {"double_quantize": one_block}),
    Wrong("to the level below it and not to the nearest", {"double_quantize": level_below}),
    Wrong("the mean was summed in fp32", {"double_quantize": summed_in_fp32}),
    Wrong("absmax_offset was not added back", {"restore": offset_forgotten}),
    Wrong("it is added after the product", {"restore": offset_scaled}),
]
