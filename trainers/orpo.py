"""Odds ratio preference optimisation: fine-tuning and preference in one loss, without a reference model.

    P(y | x)  = exp(mean_t log p(y_t | x, y_<t))             geometric mean over the answer's tokens
    odds(p)   = p / (1 - p)
    L = NLL(y_c | x) - λ · log σ(log odds(P_c) - log odds(P_r))        ORPO, Hong et al. 2024, arXiv 2403.07691, eq. 6

With lp = log P, log odds = lp - log(1 - e^lp). The last logarithm is taken in one of two forms, since 1 - e^lp has no
digits left when lp is near 0, and e^lp none beside 1 when lp is far from it (Mächler 2012):

    log(1 - e^x)  =  log(-expm1(x))   for x > -ln 2,      log1p(-exp(x))   otherwise

    B pairs, T tokens

The NLL is summed over the answers' tokens (`--nll answer`), or over prompt and answer as TRL and the authors do
(`--nll all`), and divided by the number of such tokens in the whole window; the odds term is a mean over its pairs.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - eˣ) for x ≤ 0, in x's dtype; x nearer to 0 than one rounding of 1 counts as that, with gradient 0."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def orpo_loss(
    chosen_mean_logps: Tensor,
    rejected_mean_logps: Tensor,
    chosen_nll: Tensor,
    *,
    lambda_or: float = 0.1,
    num_items: int | None = None,
    num_pairs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(a batch's share of the window's loss: a scalar, log odds ratios (B,) without a gradient).

    chosen_mean_logps, rejected_mean_logps (B,): mean log-probability of an answer's tokens, ≤ 0. chosen_nll (B,): sums
    over tokens. num_items: tokens in chosen_nll over the whole window; num_pairs: its pairs. None: this batch's pairs.
    Raises ValueError when lambda_or is negative.
    """
    if not 0 <= lambda_or < math.inf:
        raise ValueError(f"lambda_or must not be negative, got {lambda_or}")
    wide = torch.promote_types(chosen_mean_logps.dtype, torch.float32)
    chosen, rejected = chosen_mean_logps.to(wide), rejected_mean_logps.to(wide)
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    items, pairs = (max(1, len(chosen) if n is None else n) for n in (num_items, num_pairs))
    loss = chosen_nll.sum() / items - lambda_or * F.logsigmoid(log_odds).sum() / pairs
    return loss, log_odds.detach()
