"""GRPO's definitions, a second time: loops over Python floats (float64), from the papers, importing nothing of ours.

    GRPO   Shao et al. 2024, arXiv 2402.03300          DAPO   Yu et al. 2025, arXiv 2503.14476
    GSPO   Zheng et al. 2025, arXiv 2507.18071         Dr. GRPO   Liu et al. 2025, arXiv 2503.20783

Matrices are nested lists (B completions of T tokens), as in reference.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

Vector = list[float]
Matrix = list[list[float]]


def group_advantages(rewards: Vector, group: int, *, scale: str, eps: float) -> Vector:
    """(r - mean of its group) / (standard deviation, n - 1, of its group or of all + eps). NaN: no reward, 0."""

    def spread(values: Vector) -> float:
        mean = sum(values) / max(1, len(values))
        return math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))

    every = [r for r in rewards if not math.isnan(r)]
    out: Vector = []
    for start in range(0, len(rewards), group):
        mine = rewards[start : start + group]
        known = [r for r in mine if not math.isnan(r)]
        divisor = 1.0 if scale == "none" else spread(known if scale == "group" else every) + eps
        out += [0.0 if math.isnan(r) else (r - sum(known) / len(known)) / divisor for r in mine]
    return out


class PolicyLoss(NamedTuple):
    loss: float
    gradient: Matrix
    """of the loss, by each token's log-probability"""
    low: float
    """share of the counted tokens clipped below, and above"""
    high: float
    kl: float
    mean_abs_log: float
    """of the ratio, over the counted tokens"""


def grpo_loss(
    logps: Matrix,
    old_logps: Matrix,
    advantages: Vector,
    mask: Matrix,
    *,
    ref_logps: Matrix | None = None,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float = math.inf,
    loss_type: str = "dapo",
    level: str = "token",
    max_completion_length: int = 1,
    num_items: float | None = None,
) -> PolicyLoss:
    """Token by token: -min(ρA, clip(ρ)A) + β·(e^d - d - 1), and its derivative by hand.

    ρ depends on the sequence's other tokens at level "sequence": there each token of the |o| moves s by s/|o|, and the
    |o| equal losses move together. At "sequence_token" a token moves its own copy of s alone.
    """
    lengths = [int(sum(row)) for row in mask]
    by_token = loss_type in ("dapo", "bnpo")
    items = (sum(lengths) if by_token else len(mask)) if num_items is None else num_items
    loss = low = high = kl = distance = 0.0
    gradient = [[0.0] * len(row) for row in logps]
    for i, A in enumerate(advantages):
        counted = [t for t, m in enumerate(mask[i]) if m]
        weight = {"grpo": 1 / max(1, lengths[i]), "dr_grpo": 1 / max_completion_length}.get(loss_type, 1.0) / max(
            1, items
        )
        mean = sum(logps[i][t] - old_logps[i][t] for t in counted) / max(1, len(counted))
        for t in counted:
            ratio = math.exp(logps[i][t] - old_logps[i][t] if level == "token" else mean)
            free, bound = min(ratio, delta) * A, min(max(ratio, 1 - epsilon), 1 + epsilon_high) * A
            loss -= weight * min(free, bound)
            if free <= bound and ratio <= delta:
                gradient[i][t] -= weight * A * ratio
            distance += abs(math.log(ratio))
            low += ratio < 1 - epsilon and A < 0
            high += ratio > 1 + epsilon_high and A > 0
            if ref_logps is not None:
                d = ref_logps[i][t] - logps[i][t]
                kl += math.exp(d) - d - 1
                loss += weight * beta * (math.exp(d) - d - 1)
                gradient[i][t] += weight * beta * (1 - math.exp(d))
    n = max(1, sum(lengths))
    return PolicyLoss(loss, gradient, low / n, high / n, kl / n, distance / n)
