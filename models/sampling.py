"""Choosing the next token: filters, and randomness that belongs to a row and not to the batch around it.

    p       = softmax(logits / temperature)
    top-k   keeps the k most probable tokens
    top-p   keeps the fewest tokens, most probable first, whose p (renormalised after top-k) reach top_p
            (nucleus sampling, arXiv 1904.09751)
    sample  a block b of neighbouring tokens with probability P_b = Σ_{v in b} p_v, then v in it with p_v / P_b,
            each by argmax_i p_i / E_i over the kept,  E_i ~ Exp(1) independent

The argmax draws i with probability p_i / Σ p (exponential race: the first of independent clocks with rates p_i to
ring; the Gumbel-max trick, in other words). Unlike a search in the cumulated p it does not add up rounding over the
vocabulary, so the last bits of a logit, which change with the batch's shape, very rarely decide. Two races need
V / 128 + 128 random numbers a token, one over all tokens V of them: 512 and not 49,152, which cost more than the head.

E_i comes from a counter and not from a generator with a state: splitmix64 (Steele, Lea and Flood, 2014) of a key, the
position and a number of the token or the block. The key is a hash of the seed, the prompt's ids and the number of the
generation. So a row draws the same numbers alone, in any batch, and on any device.

    R rows, V vocabulary, C candidates kept
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.elementwise import one_pass

BLOCK = 128
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # int64 of splitmix64's increment; torch's int64 products wrap, as it needs
MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX2 = 0x94D049BB133111EB - (1 << 64)


def row_key(seed: int, prompt: Sequence[int], generation: int) -> int:
    """An int64 that stands for a row: blake2b of the seed, the prompt's ids and the number of the generation."""
    text = f"{seed}|{generation}|{','.join(map(str, prompt))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def exponentials(keys: Tensor, positions: Tensor, numbers: Tensor) -> Tensor:
    """Exp(1) of rows with these int64 keys and positions (R,), for numbers int64 (C,) or (R, C): float64 (R, C)."""
    row = _splitmix64(keys + positions * GOLDEN)
    bits = _splitmix64(row[:, None] + (numbers + 1) * GOLDEN)
    uniform = (_shift_right(bits, 12).double() + 0.5) * 2.0**-52  # 52 bits and a half, exact: never 0, never 1
    return -torch.log(uniform)


def _splitmix64(z: Tensor) -> Tensor:
    """The output function of splitmix64: int64 → int64."""
    z = (z ^ _shift_right(z, 30)) * MIX1
    z = (z ^ _shift_right(z, 27)) * MIX2
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """The logical shift: int64's own repeats the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def candidates(logps: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """What top-k, then top-p leave of logps (R, V): (logps, tokens), each (R, C), with -inf for what is cut.

    At least the most probable token stays. Ties at the border of top-k are cut in no particular order.
    """
    V = logps.shape[1]
    if top_k == 0 and top_p == 1.0:
        return logps, torch.arange(V, device=logps.device).expand(logps.shape)
    kept, tokens = torch.topk(logps, min(top_k or V, V), dim=1)  # most probable first
    if top_p < 1.0:
        p = torch.softmax(kept.double(), dim=1)
        before = p.cumsum(dim=1) - p
        reached = before >= top_p
        reached[:, 0] = False
        kept = kept.masked_fill(reached, -torch.inf)
    return kept, tokens


class Softmax(NamedTuple):
    """p = softmax(logits / temperature) of each row, without p itself."""

    logits: Tensor
    """(R, V)"""
    temperature: float
    largest: Tensor
    """(R, 1), of the logits"""
    log_total: Tensor
    """(R, 1): log Σ_v exp((logits_v - largest) / temperature)"""
    blocks: Tensor
    """(R, V / BLOCK): Σ p over each block"""

    def logps(self, tokens: Tensor | None = None) -> Tensor:
        """log p of tokens (R, C), or of all."""
        logits = self.logits if tokens is None else self.logits.gather(1, tokens)
        return (logits - self.largest) / self.temperature - self.log_total


def softmax(logits: Tensor, temperature: float) -> Softmax:
    """Of logits fp32 (R, V)."""
    fast = one_pass(logits)
    if fast:
        return Softmax(logits, temperature, *fast.softmax_blocks(logits, temperature, BLOCK))
    largest = logits.amax(dim=1, keepdim=True)
    p = ((logits - largest) / temperature).exp()
    total = p.sum(dim=1, keepdim=True)
    blocks = F.pad(p, (0, -p.shape[1] % BLOCK)).view(len(p), -1, BLOCK).sum(dim=2) / total
    return Softmax(logits, temperature, largest, total.log(), blocks)


def sample(
    logits: Tensor, keys: Tensor, positions: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The next token of each row, int64 (R,), and its log p under softmax(logits / temperature), fp32 (R,).

    logits fp32 (R, V). temperature 0 takes the most probable token, and needs no randomness; its log p is unscaled.
    """
    whole = kept = softmax(logits, temperature or 1.0)
    if temperature == 0.0:
        token = logits.argmax(dim=1, keepdim=True)
    else:
        if top_k or top_p < 1.0:
            logps, tokens = candidates(whole.logps(), top_k=top_k, top_p=top_p)
            kept = softmax(torch.full_like(logits, -torch.inf).scatter_(1, tokens, logps), 1.0)
        numbers = torch.arange(kept.blocks.shape[1], device=logits.device)
        block = _first(kept.blocks, exponentials(keys, positions, -2 - numbers))  # numbers that no token has
        tokens = (block * BLOCK + torch.arange(BLOCK, device=logits.device)).clamp(max=logits.shape[1] - 1)
        token = tokens.gather(1, _first(kept.logps(tokens).exp(), exponentials(keys, positions, tokens)))
    return token[:, 0], whole.logps(token)[:, 0]


def _first(rates: Tensor, exponentials: Tensor) -> Tensor:
    """Which clock rings first: (R, C) → (R, 1)."""
    return (rates.double() / exponentials).argmax(dim=1, keepdim=True)
