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

import torch
from torch import Tensor
from torch.nn import functional as F

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


def sample(
    logps: Tensor, keys: Tensor, positions: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """The next token of each row, int64 (R,). logps fp32 (R, V), already divided by the temperature and normalised.

    temperature 0 takes the most probable token, and needs no randomness.
    """
    if temperature == 0.0:
        return logps.argmax(dim=1)
    if top_k or top_p < 1.0:
        kept, tokens = candidates(logps, top_k=top_k, top_p=top_p)
        logps = torch.full_like(logps, -torch.inf).scatter_(1, tokens, kept)
    R, V = logps.shape
    p = F.pad(logps.exp(), (0, -V % BLOCK)).view(R, -1, BLOCK)
    blocks = torch.arange(p.shape[1], device=p.device)
    block = _first(p.sum(dim=2), exponentials(keys, positions, -2 - blocks))  # numbers that no token has
    tokens = block[:, None] * BLOCK + torch.arange(BLOCK, device=p.device)
    p = p[torch.arange(R, device=p.device), block]
    return block * BLOCK + _first(p, exponentials(keys, positions, tokens))


def _first(rates: Tensor, exponentials: Tensor) -> Tensor:
    """Which clock rings first: (R, C) → (R,)."""
    return (rates.double() / exponentials).argmax(dim=1)
