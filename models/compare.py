"""How far apart two models are on the same text: the largest change of a logit, and the KL of what they predict.

    KL(p‖q) = Σ_v p_v · (log p_v - log q_v)        p, q: softmax of the logits at a position; the mean over positions

    M positions, D hidden size, V vocabulary

What is kept of a model is its last hidden states and its head: (M, D) numbers in place of (M, V). Logits are made from
them for a few positions at a time, in fp32, and compared in float64, since a KL of 1e-6 is a difference of numbers
near 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import kernels

from .decoder import Decoder

CHUNK = 1 << 22  # logits at a time


class Outputs(NamedTuple):
    """What a model said, to be compared later: changing the model does not change it."""

    hidden: Tensor
    """(M, D)"""
    head: kernels.Head


class Difference(NamedTuple):
    kl: float
    """mean KL(p‖q), in nats a token"""
    largest_logit_change: float


@torch.no_grad()
def outputs(model: Decoder, rows: Sequence[Sequence[int]]) -> Outputs:
    """The hidden states of every token of every row, with the adapters that are on now.

    Raises ValueError for no tokens at all, and for an id outside the model's vocabulary.
    """
    rows = [row for row in rows if row]
    largest = max((max(row) for row in rows), default=-1)
    if not 0 <= largest < model.config.vocab_size:
        raise ValueError(f"the text needs ids below {model.config.vocab_size}, the model's vocabulary, found {largest}")
    states = [model(torch.tensor([row], device=model.device), return_hidden=True)[0] for row in rows]
    return Outputs(torch.cat(states), model.head())


@torch.no_grad()
def compare(p: Outputs, q: Outputs) -> Difference:
    """q against p, of the same rows. Raises ValueError when the logits of either are not finite."""
    V = p.head.weight.shape[0]
    kl, change, positions = 0.0, 0.0, max(CHUNK // V, 1)
    for start in range(0, len(p.hidden), positions):
        chunk = slice(start, start + positions)
        ours, theirs = _logits(p, chunk), _logits(q, chunk)
        if not (torch.isfinite(ours).all() and torch.isfinite(theirs).all()):
            raise ValueError("the models cannot be compared: their logits are NaN or infinite")
        log_p, log_q = ours.log_softmax(1), theirs.log_softmax(1)
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        change = max(change, float((ours - theirs).abs().max()))
    return Difference(kl / len(p.hidden), change)


def _logits(said: Outputs, chunk: slice) -> Tensor:
    """float64 (rows of the chunk, V), of logits computed as the model does."""
    head = said.head
    return kernels.lora_matmul(said.hidden[chunk], head.weight, head.adapters, bias=head.bias).float().double()
