"""vocabulary_tiles: linear_cross_entropy where the head is nothing but a dense weight, TILE words of it at a time.

FlashAttention (Dao et al. 2022, arXiv 2205.14135) with words in the place of keys: whatever is summed over the
vocabulary is summed under the largest logit so far, and scaled down when a larger one comes. Of a row of logits no more
than a tile ever exists, and a tile of W serves both its products while it is in the cache.

    for each tile      z = x · W_tileᵀ / τ,   m' = max(m, max z),   c = e^(m - m'),   e = e^(z - m')
                       mixed ← c · (mixed + (m - m') · total) + Σ e · (z - m')
                       total ← c · total + Σ e
                       slope ← c · slope + e · W_tile, without the target's e
    nll = m + log total - z[target],   H = log total - mixed / total
    dnll/dx = (Σ_v≠target p_v · W_v - (1 - p_target) · W_target) / τ = (slope / total + (e^-nll - 1) · W_target) / τ

A head that is trained wants Σ_rows dnll · (p - onehot) · x, for which dnll must be known: m and log total are kept, and
backward makes p again a tile at a time.

Under a frozen head in bf16 all of this is fp32 but the products. Where the C kernels multiply pairs, x · W is of bf16
numbers and not rounded, e · W_tile is torch's in bf16; elsewhere a tile of W is widened. The target's own share of the
slope is kept out of a product that rounds: where a token is likely, almost all of it is subtracted again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .buffers import empty, empty_like
from .dispatch import asked_backend

TILE = 768  # words, a multiple of 32 (C): a tile of W (1.8 MB at D = 576) and of the logits stay in the cache
ROWS = 1024  # rows at a time, for the same reason


class RunningSoftmax:
    """The sums over the words so far, for each row: see above. `mixed` is kept on request."""

    def __init__(self, targets: Tensor, temperature: float, like: Tensor, with_entropy: bool) -> None:
        self.targets, self.temperature = targets, temperature
        self.m = torch.full((len(targets),), -torch.inf, dtype=like.dtype, device=like.device)
        """largest z · τ"""
        self.at_target = torch.zeros_like(self.m)
        """z[target] · τ"""
        self.total = torch.zeros(len(targets), dtype=torch.float64, device=like.device)
        self.mixed = torch.zeros_like(self.total) if with_entropy else None

    def take(self, z: Tensor, first: int, slope: Tensor | None) -> None:
        """z (rows, tile) = x · W_tileᵀ, words `first` …, becomes e in place. slope (rows, D) is scaled by c."""
        if asked_backend() in ("auto", "cpu"):
            from .cpu import elementwise  # the C kernels are a backend like any other: this file does not need them

            if elementwise.serves_softmax(z):
                sums = (self.m, self.at_target, self.total, self.mixed, slope)
                return elementwise.running_softmax(z, self.temperature, self.targets, first, *sums)
        at = self.targets - first
        found = z.gather(1, at.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
        self.at_target = torch.where((at >= 0) & (at < z.shape[1]), found, self.at_target)
        m = torch.maximum(self.m, z.amax(dim=1))
        change = (self.m - m) / self.temperature  # -inf at first
        shifted, c = z.sub_(m[:, None]).div_(self.temperature), change.exp()
        if self.mixed is not None:
            before = torch.where(self.total > 0, self.mixed + change * self.total, 0)
            self.mixed = c * before + (shifted.exp() * shifted).sum(dim=1)
        self.total = c * self.total + shifted.exp_().sum(dim=1)
        self.m = m
        if slope is not None:
            slope.mul_(c[:, None])

    def nll(self) -> Tensor:
        """(m,)"""
        return self.total.log().to(self.m.dtype) + (self.m - self.at_target) / self.temperature

    def entropy(self) -> Tensor:
        """(m,)"""
        assert self.mixed is not None
        return (self.total.log() - self.mixed / self.total).to(self.m.dtype)


class Found(NamedTuple):
    """Of M rows."""

    nll: Tensor
    """(M,)"""
    entropy: Tensor
    """(M,); 0 unless it was asked for"""
    m: Tensor
    """(M,)"""
    log_total: Tensor
    """(M,)"""
    slope: Tensor | None
    """dnll/dx (M, D), if it was asked for"""


def serves(hidden: Tensor, head: tuple[Any, ...], softcap: float | None) -> bool:
    """Whether z is nothing but x · Wᵀ / τ, in the dtype it is wanted in, or in bf16 on a CPU under a frozen head.

    head: weight, adapters, bias.
    """
    weight, adapters, bias = head
    if not isinstance(weight, Tensor) or adapters or bias is not None or softcap is not None:
        return False
    if weight.dtype == hidden.dtype == torch.bfloat16:
        return hidden.device.type == "cpu" and not weight.requires_grad
    return weight.dtype == hidden.dtype in (torch.float32, torch.float64)


def losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, with_entropy: bool, with_slope: bool
) -> Found:
    """hidden (M, D), weight (V, D), both fp32, fp64 or bf16; targets int64 (M,). Of bf16 what is found is fp32."""
    like = hidden[:0].to(torch.promote_types(hidden.dtype, torch.float32))
    nll, m, log_total = (like.new_empty(len(targets)) for _ in range(3))
    entropy = torch.zeros_like(nll)
    slope = like.new_empty(hidden.shape) if with_slope else None
    in_pairs = _in_pairs(hidden, weight)
    for rows in row_blocks(len(targets), ROWS):
        x = hidden[rows] if in_pairs else hidden[rows].to(like.dtype)
        dx = None if slope is None else slope[rows]
        sums = RunningSoftmax(targets[rows], temperature, like, with_entropy)
        buffer = empty((len(x), TILE), like.dtype, hidden.device)
        for first in range(0, len(weight), TILE):
            tile = weight[first : first + TILE].to(x.dtype)
            z = _logits(x, tile, buffer)
            sums.take(z, first, dx if first else None)
            if dx is not None:
                _add_slope(dx, _without_targets(z, targets[rows] - first), tile, is_first=first == 0)
        nll[rows], m[rows], log_total[rows] = sums.nll(), sums.m, sums.total.log()
        if with_entropy:
            entropy[rows] = sums.entropy()
        if dx is not None:
            of_target = torch.expm1(-nll[rows])[:, None] * weight[targets[rows]]
            dx.div_(sums.total[:, None]).add_(of_target).div_(temperature)
    return Found(nll, entropy, m, log_total, slope)


def _without_targets(e: Tensor, at: Tensor) -> Tensor:
    """e (rows, tile), in place, with 0 for each row's target, which is word `at` of the tile if it is in it."""
    rows = ((at >= 0) & (at < e.shape[1])).nonzero()[:, 0]
    e[rows, at[rows]] = 0
    return e


def _add_slope(dx: Tensor, e: Tensor, tile: Tensor, is_first: bool) -> None:
    """dx += e · tile; the first tile's is all there is."""
    if tile.dtype == dx.dtype:
        torch.addmm(dx, e, tile, beta=0 if is_first else 1, out=dx)
    elif is_first:
        dx.copy_(torch.mm(e.to(tile.dtype), tile))
    else:
        dx.add_(torch.mm(e.to(tile.dtype), tile))


def gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    sums: Sequence[Tensor],
    dnll: Tensor,
    temperature: float,
    want_dx: bool,
) -> tuple[Tensor | None, Tensor]:
    """dx (M, D), if it is wanted, and dW (V, D); `sums` are m and log_total as `losses` found them, dnll (M,)."""
    m, log_total = sums
    scale = (dnll / temperature)[:, None]
    scaled, dx = hidden * scale, empty_like(hidden) if want_dx else None
    dW = torch.empty_like(weight) if len(targets) else torch.zeros_like(weight)
    for rows in row_blocks(len(targets), ROWS):
        buffer = empty((len(hidden[rows]), TILE), hidden.dtype, hidden.device)
        for first in range(0, len(weight), TILE):
            words = slice(first, first + TILE)
            p = _logits(hidden[rows], weight[words], buffer).sub_(m[rows, None])
            p.div_(temperature).sub_(log_total[rows, None]).exp_()
            if dx is not None:
                torch.addmm(dx[rows], p, weight[words], beta=1 if first else 0, out=dx[rows])
            torch.addmm(dW[words], p.T, scaled[rows], beta=1 if rows.start else 0, out=dW[words])
    dW.index_add_(0, targets, scaled, alpha=-1)
    return None if dx is None else dx.sub_(weight[targets]).mul_(scale), dW


def row_blocks(M: int, most: int) -> list[slice]:
    """M rows in blocks of at most `most`, of equal size: a short last one would read the whole head for a few rows."""
    rows = -(-M // -(-M // most)) if M else 1
    return [slice(start, min(start + rows, M)) for start in range(0, M, rows)]


def _in_pairs(hidden: Tensor, weight: Tensor) -> bool:
    """Whether C multiplies these in bf16 and gives sums that are not rounded."""
    if asked_backend() not in ("auto", "cpu"):
        return False
    from .cpu import dense  # the C kernels are a backend like any other: this file does not need them

    return weight.dtype == torch.bfloat16 and dense.fits(hidden, weight) and dense.in_pairs(hidden, weight)


def _logits(x: Tensor, tile: Tensor, buffer: Tensor) -> Tensor:
    """x · tileᵀ, dense, in `buffer`. x and tile in its dtype, or in pairs."""
    z = buffer.view(-1)[: len(x) * len(tile)].view(len(x), len(tile))
    if x.dtype == z.dtype:
        return torch.mm(x, tile.T, out=z)
    from .cpu import dense  # only what `_in_pairs` found to fit comes here

    return dense.product(x, tile, z)
