import torch
from torch import Tensor

from . import Wrong


def finished(x: Tensor, total: Tensor) -> Tensor:
    return torch.where(x.isnan(), 0x7FC0, total >> 16 & 0xFFFF)


def cut_off(x: Tensor) -> Tensor:
    return finished(x, x.view(torch.int32))


def half_up(x: Tensor) -> Tensor:
    return finished(x, x.view(torch.int32) + 0x8000)


def to_odd(x: Tensor) -> Tensor:
    bits = x.view(torch.int32)
    return finished(x, bits + 0x7FFF + (bits >> 16 & 1 ^ 1))


def nan_forgotten(x: Tensor) -> Tensor:
    bits = x.view(torch.int32)
    return bits + 0x7FFF + (bits >> 16 & 1) >> 16 & 0xFFFF


def sign_copied_down(x: Tensor) -> Tensor:
    bits = x.view(torch.int32)
    return torch.where(x.isnan(), 0x7FC0, bits + 0x7FFF + (bits >> 16 & 1) >> 16)


def the_number_itself(x: Tensor) -> Tensor:
    return (finished(x, x.view(torch.int32)) << 16).view(torch.float32)


WRONG = [
    Wrong("the lower half is cut off", {"round_to_bf16": cut_off}),
    Wrong("ties go away from zero", {"round_to_bf16": half_up}),
    Wrong("ties go to the odd neighbour", {"round_to_bf16": to_odd}),
    Wrong("a NaN was rounded like a number", {"round_to_bf16": nan_forgotten}),
    Wrong(">> copies the sign bit down", {"round_to_bf16": sign_copied_down}),
    Wrong("must be torch.int32, got torch.float32", {"round_to_bf16": the_number_itself}),
]
