"""Preference losses restated in float64 from the papers, a pair at a time, with their derivatives. Nothing of ours.

Preferences. DPO: arXiv 2305.18290 eq. 7. cDPO, robust DPO (2403.00409), SLiC's hinge (2305.10425), IPO (2310.12036
eq. 17), Tülu 3's means (2411.15124), RPO (2404.19733 eq. 1), ORPO (2403.07691 eq. 4 to 7)
"""

import math
from typing import NamedTuple


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


class PairLoss(NamedTuple):
    loss: float
    by_chosen: float
    """derivative by the policy's log-probability of the chosen answer"""
    by_rejected: float


def dpo_pair(
    policy: tuple[float, float], ref: tuple[float, float], lengths: tuple[int, int], beta: float, kind: str, eps: float
) -> PairLoss:
    """One pair; policy, ref and lengths are (chosen, rejected), log-probabilities summed over tokens."""
    weights = [1 / max(n, 1) if kind in ("ipo", "sigmoid_norm") else 1.0 for n in lengths]
    delta = weights[0] * (policy[0] - ref[0]) - weights[1] * (policy[1] - ref[1])
    z = beta * delta
    if kind in ("ipo", "ipo_sum"):
        loss, slope = (delta - 1 / (2 * beta)) ** 2, 2 * (delta - 1 / (2 * beta))
    elif kind == "hinge":
        loss, slope = max(0.0, 1 - z), -beta if z < 1 else 0.0
    else:  # d log σ(z) = σ(-z) dz
        right, wrong = (1 - eps, eps) if kind != "robust" else ((1 - eps) / (1 - 2 * eps), -eps / (1 - 2 * eps))
        loss = -right * log_sigmoid(z) - wrong * log_sigmoid(-z)
        slope = beta * (-right * sigmoid(-z) + wrong * sigmoid(z))
    return PairLoss(loss, slope * weights[0], -slope * weights[1])


def log_odds(mean_logp: float) -> tuple[float, float]:
    """log(p / (1 - p)) of p = exp(mean_logp) < 1, and its derivative 1 / (1 - p)."""
    left = -math.expm1(mean_logp)
    return mean_logp - math.log(left), 1 / left


def orpo_pair(chosen: float, rejected: float, lambda_or: float) -> PairLoss:
    """-λ log σ(log odds ratio) of one pair of mean log-probabilities; the NLL is added to it."""
    (odds_c, slope_c), (odds_r, slope_r) = log_odds(chosen), log_odds(rejected)
    slope = -lambda_or * sigmoid(odds_r - odds_c)
    return PairLoss(-lambda_or * log_sigmoid(odds_c - odds_r), slope * slope_c, -slope * slope_r)
