"""decode: all layers of a decoder for one new token a row, in one call.

Decoding a token is a dozen operations a layer, each on a few numbers: at one row a call from Python costs as much as
its work. models/decoder.py is the definition; this is the same in one call, for layers whose seven matrices are in 4
bits, in fp32 or bf16 on the CPU (kernels/cpu/decode.h). What it does not serve, the definition does.

    R rows, D hidden size, Kv key-value heads, Dh head size, S entries of a row's cache
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import asked_backend
from .grouped_lora_matmul import Projection


class Layer(NamedTuple):
    """What a layer of a decoder holds."""

    projections: tuple[Projection, ...]
    """q, k, v, o, gate, up, down"""
    norms: tuple[Tensor, Tensor]
    """gains (D,) of the RMSNorm before attention, and of the one before the MLP"""
    head_norms: tuple[Tensor, Tensor] | None
    """gains (Dh,) of the RMSNorm of each head of q and of k"""
    has_rope: bool


class Shape(NamedTuple):
    """What all layers of a decoder share."""

    heads: int
    key_value_heads: int
    head_dim: int
    eps: float
    """ε of every RMSNorm"""
    dtype: torch.dtype
    """of the activations and the cache"""


class Entries(NamedTuple):
    """Where the new token of each row lies in a layer's cache, and what it attends to."""

    keys: Tensor
    """(≥ R, Kv, S, Dh), written to"""
    values: Tensor
    """(≥ R, Kv, S, Dh), written to"""
    slots: Tensor
    """int64 (R,): where the new entry goes"""
    counts: Tensor
    """int64 (R,): entries 0 … count - 1 are attended to, the new one among them"""


DecodeStep = Callable[[Tensor, Tensor, Tensor, Sequence[Entries]], None]
"""(x (R, D), cos and sin fp32 (R, Dh/2), entries of every layer): x goes in as embeddings and comes out of the last
layer, in place; the cache gets the new keys and values."""


def decode_step(layers: Sequence[Layer], shape: Shape) -> DecodeStep | None:
    """The call for these layers, or None where there is none. It holds what the layers are now: adapters, weights."""
    if asked_backend() not in ("auto", "cpu"):
        return None
    from .cpu import decode  # the C kernels are a backend like any other: this file does not need them

    return decode.decode_step(layers, shape)
