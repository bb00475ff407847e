"""maps: the tables by which quantize.h finds the nearest level, of 16 or of 256."""

import ctypes
import math
from ctypes import c_float, c_uint8, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from quant.blockwise import nearest_table
from quant.codebook import codebook, dynamic_map


class Nearest(ctypes.Structure):
    """quantize.h: nearest."""

    _fields_ = (("midpoints", c_float * 8 * 4), ("index", c_uint8 * 16))


class Map8Bit(ctypes.Structure):
    """quantize.h: map_8bit."""

    _fields_ = (("level", c_void_p), ("threshold", c_void_p), ("first", c_void_p))


@lru_cache
def nearest(quant_type: str) -> Nearest:
    """quant.blockwise.nearest_table, the midpoints as a search tree."""
    midpoints, indices = nearest_table(codebook(quant_type))
    tree = Nearest(index=(c_uint8 * 16)(*indices.tolist()))
    padded = [*midpoints.tolist(), *[float("inf")] * (15 - len(midpoints))]  # fp4 and int4 have two zeros
    for step in range(4):
        compared = padded[(8 >> step) - 1 :: 16 >> step]  # 7; 3, 11; 1, 5, 9, 13; 0, 2, …
        tree.midpoints[step][: len(compared)] = compared
    return tree


def map_8bit(signed: bool) -> Map8Bit:
    """The dynamic map, as C reads it."""
    return Map8Bit(*(t.data_ptr() for t in map_tables(signed)))


@lru_cache
def map_tables(signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """level fp32 (256,), threshold fp32 (256,), first uint8 (65536,): quantize.h says what they are."""
    level = dynamic_map(signed)
    middle = (level[:-1].double() + level[1:].double()) / 2
    rounded = middle.float()
    above = torch.nextafter(rounded, torch.tensor(math.inf))
    upper_is_even = torch.arange(1, 256) % 2 == 0  # a tie goes up
    enough = (rounded.double() > middle) | ((rounded.double() == middle) & upper_is_even)
    threshold = torch.cat([torch.where(enough, rounded, above), torch.tensor([math.inf])])
    halves = torch.arange(65536, dtype=torch.int32)
    lowest = torch.where(halves < 32768, halves << 16, (halves << 16) | 0xFFFF)  # a negative's largest magnitude
    least = lowest.to(torch.int32).view(torch.float32)
    at_or_below = torch.searchsorted(threshold, least, right=True)
    return level, threshold, at_or_below.masked_fill(least.isnan(), 0).to(torch.uint8)
