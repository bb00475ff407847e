"""How far a student's distribution over the vocabulary is from its teacher's, and the slope of that.

Generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649, eq. 1), with T the teacher, S the student:

    KL(P ‖ Q) = Σ_v P_v (log P_v - log Q_v)
    0 < β < 1     D = β · KL(T ‖ M) + (1 - β) · KL(S ‖ M)            M = β · T + (1 - β) · S
    β = 0         D = KL(T ‖ S), forward KL: the student covers all that the teacher does (arXiv 1503.02531)
    β = 1         D = KL(S ‖ T), reverse KL: the student keeps to what the teacher does (MiniLLM, arXiv 2306.08543)

The two ends are definitions and no limits: D → 0 as β → 0 or 1, and D / β → KL(T ‖ S) as β → 0. So D jumps there.

Slope by the student's logits, with p = S, d = log S - log M (log S - log T for β = 1) and D' = Σ p d:

    β = 0         dz = p - T                    else   dz = (1 - β) · p ⊙ (d - D')          (β = 1: without 1 - β)

A teacher may be known by its k likeliest tokens alone. The rest is then one more outcome, "another token", for both:

    T_rest = 1 - Σ_k T_k        S_rest = Σ over the other tokens of S_v        dz_v = dz_rest · S_v / S_rest  there

D of these k + 1 outcomes is at most the whole D (merging outcomes never adds divergence), is 0 where student and
teacher agree, and says nothing about how the student spreads the rest. (Renormalising the k instead would give the
other tokens no weight at all, and teach the student to give them none.)

    M rows, V vocabulary, K outcomes: V, or k + 1
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class TopK(NamedTuple):
    """A teacher's likeliest tokens of each row, without repetition."""

    ids: Tensor
    """(M, k), any integer dtype"""
    logps: Tensor
    """(M, k): log softmax over the whole vocabulary, at the temperature at which the student is compared"""


def check_mix(beta: float, temperature: float) -> None:
    """Raises ValueError for a beta outside [0, 1] and a temperature that is not positive."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive, got {temperature}")


def divergence(s: Tensor, t: Tensor, beta: float) -> Tensor:
    """D (M,) of log-probabilities: s the student's, t the teacher's, (M, K), all finite. Differentiable in both."""
    if beta == 0:
        return (t.exp() * (t - s)).sum(dim=1)
    if beta == 1:
        return (s.exp() * (s - t)).sum(dim=1)
    m = mixture(s, t, beta)
    return beta * (t.exp() * (t - m)).sum(dim=1) + (1 - beta) * (s.exp() * (s - m)).sum(dim=1)


def divergence_and_slope(s: Tensor, t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(D (M,), its gradient (M, K) by logits whose log-softmax is s). The closed form, outside of autograd."""
    if beta == 0:
        q = t.exp()
        return (q * (t - s)).sum(dim=1), s.exp().sub_(q)
    p = s.exp()
    m = t if beta == 1 else mixture(s, t, beta)
    d = s - m
    mean = (p * d).sum(dim=1, keepdim=True)
    slope = d.sub_(mean).mul_(p)
    if beta == 1:
        return mean[:, 0], slope
    return beta * (t.exp() * (t - m)).sum(dim=1) + (1 - beta) * mean[:, 0], slope.mul_(1 - beta)


def mixture(s: Tensor, t: Tensor, beta: float) -> Tensor:
    """log(β · T + (1 - β) · S)."""
    return torch.logaddexp(s + math.log1p(-beta), t + math.log(beta))


def student_outcomes(logps: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities (M, V) of all tokens → those of `ids` (M, k) and of any other token: (M, k + 1), or (M, V)."""
    chosen = logps.gather(1, ids)
    if ids.shape[1] == logps.shape[1]:
        return chosen
    others = logps.scatter(1, ids, torch.finfo(logps.dtype).min)  # 0 after exp, and no NaN in any gradient
    return torch.cat([chosen, others.logsumexp(dim=1, keepdim=True)], dim=1)


def teacher_outcomes(logps: Tensor, V: int) -> Tensor:
    """The teacher's k log-probabilities and that of any other token, to go with `student_outcomes`.

    What is left of 1 is known to the last bit of 1 only: it is taken to be that bit at least.
    """
    if logps.shape[1] == V:
        return logps
    rest = -torch.expm1(logps.logsumexp(dim=1, keepdim=True))
    return torch.cat([logps, rest.clamp(min=torch.finfo(logps.dtype).eps).log()], dim=1)


def spread(slope: Tensor, logps: Tensor, ids: Tensor) -> Tensor:
    """The slope by outcomes (M, k + 1) → by the logits of all tokens (M, V)."""
    k = ids.shape[1]
    if k == logps.shape[1]:
        return torch.empty_like(logps).scatter_(1, ids, slope)
    others = logps.scatter(1, ids, torch.finfo(logps.dtype).min)
    share = others.sub_(others.logsumexp(dim=1, keepdim=True)).exp_()
    return share.mul_(slope[:, k:]).scatter_(1, ids, slope[:, :k])
