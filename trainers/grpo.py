"""GRPO and its relatives: the advantages of a group, and the loss of a batch of completions.

GRPO (arXiv 2402.03300) samples G completions of a prompt and compares them with one another, not with a value model:

    A_i    = (r_i - mean(r)) / (std(r) + eps)                   over the G of a group; std with G - 1 (scale "group")
    ρ_it   = exp(logp_it - old_logp_it)                         how much likelier the token is now than when sampled
    ℓ_it   = -min(ρ_it · A_i, clip(ρ_it, 1 - ε, 1 + ε_high) · A_i) + β · k_it
    k_it   = exp(d) - d - 1,  d = ref_logp_it - logp_it         never below 0; its mean estimates KL(policy ‖ reference)

`importance_sampling_level` says whose ratio it is:

    token           ρ_it as above
    sequence        s_i = exp(mean_t (logp_it - old_logp_it)) for every token of i: GSPO (arXiv 2507.18071)
    sequence_token  sg(s_i) · p_it / sg(p_it): the value s_i, and each token's own gradient (GSPO-token, there 4.3)

`loss_type` says how the ℓ_it of the counted tokens (m_it = 1) become one number. n is `num_items`:

    grpo            Σ_i (Σ_t ℓ_it / |o_i|) / n                   n sequences: each weighs the same
    dapo, bnpo      Σ_it ℓ_it / n                                n counted tokens: each weighs the same (2503.14476)
    dr_grpo         Σ_it ℓ_it / (n · max_completion_length)      n sequences: no length in it (2503.20783)

dapo and bnpo differ in TRL, where bnpo's n is a micro-batch's; over a whole window they are one. `delta` also bounds ρ
where A < 0, which the min leaves unbounded (arXiv 2505.07291). While the policy is still the one that sampled, ρ = 1:
the loss is -mean A, near 0, and its gradient is not.

    B completions, prompt-major in groups of G; T tokens of the longest completion

Differences of log-probabilities are cut at ±20 before exp, so that nothing overflows: beyond, a ratio is e^±20 and its
gradient 0. Left out: entropy bonus, CISPO, SAPO, weights for rollouts from another engine.
"""

import torch
from torch import Tensor

SCALES = ("group", "batch", "none")
LOSS_TYPES = ("dapo", "grpo", "bnpo", "dr_grpo")
LEVELS = ("token", "sequence", "sequence_token")
LARGEST_LOG_RATIO = 20.0


def group_advantages(rewards: Tensor, num_generations: int, *, scale: str = "group", eps: float = 1e-4) -> Tensor:
    """How much better than its group each completion is: fp32 (B,) from rewards (B,), prompt-major.

    scale: divide by the group's std, by the batch's, or not at all ("none": Dr. GRPO). A NaN is a completion without a
    reward: it takes no part in means and stds, and its advantage is 0. A group without spread has advantages 0.
    Raises ValueError when B is no multiple of num_generations, or for another scale.
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    if num_generations < 1 or rewards.numel() % num_generations:
        raise ValueError(f"{rewards.numel()} rewards are no whole number of groups of {num_generations}")
    groups = rewards.double().view(-1, num_generations)  # float64: equal rewards give exactly 0
    centred = groups - torch.nanmean(groups, dim=1, keepdim=True)
    if scale == "group":
        centred = centred / (_nanstd(groups) + eps)
    elif scale == "batch":
        centred = centred / (_nanstd(groups.view(1, -1)) + eps)
    return centred.nan_to_num(nan=0.0).flatten().to(torch.float32)


def _nanstd(x: Tensor) -> Tensor:
    """The standard deviation of each row with n - 1, NaN left out; 0 for rows of fewer than two numbers: (rows, 1)."""
    n = x.isnan().logical_not().sum(dim=1, keepdim=True)
    squares = (x - torch.nanmean(x, dim=1, keepdim=True)).square().nansum(dim=1, keepdim=True)
    return (squares / (n - 1).clamp(min=1)).sqrt()


def grpo_loss(
    per_token_logps: Tensor,
    old_per_token_logps: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    ref_per_token_logps: Tensor | None = None,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    loss_type: str = "dapo",
    importance_sampling_level: str = "token",
    max_completion_length: int | None = None,
    num_items: int | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """(loss, a scalar; metrics). Gradients flow into per_token_logps alone.

    per_token_logps, old_per_token_logps (None: the same, detached), ref_per_token_logps: (B, T); advantages (B,);
    completion_mask (B, T), 1 = counts: what the others hold elsewhere does not matter. epsilon_high None: epsilon.
    num_items: of the whole window, in the loss type's unit (see above); None: this batch's own. A batch without a
    counted token gives 0. metrics are means over the counted tokens, of which "tokens" is the number: clip_ratio/low
    (ρ < 1 - ε and A < 0), clip_ratio/high (ρ > 1 + ε_high and A > 0), ratio/mean, ratio/min, ratio/max, and kl with a
    reference. Raises ValueError for settings outside their range, or that need one which is not given.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    _check(loss_type, importance_sampling_level, epsilon, high, delta, max_completion_length)
    if beta and ref_per_token_logps is None:
        raise ValueError(f"beta {beta} needs ref_per_token_logps")
    mask, A = completion_mask != 0, advantages[:, None]
    old = per_token_logps.detach() if old_per_token_logps is None else old_per_token_logps
    ratio = _importance_ratio(_difference(per_token_logps, old, mask), mask, importance_sampling_level)
    unclipped = ratio if delta is None else ratio.clamp(max=delta)
    per_token_loss = -torch.min(unclipped * A, ratio.clamp(1 - epsilon, 1 + high) * A)
    metrics = _ratio_metrics(ratio.detach(), A, mask, epsilon, high)
    if ref_per_token_logps is not None:
        d = _difference(ref_per_token_logps, per_token_logps, mask)
        per_token_kl = d.exp() - d - 1
        per_token_loss = per_token_loss + beta * per_token_kl
        metrics["kl"] = _mean(per_token_kl.detach(), mask)
    return _aggregate(per_token_loss * mask, mask, loss_type, max_completion_length, num_items), metrics


def loss_items(loss_type: str, completion_mask: Tensor) -> int:
    """What `num_items` counts, in this batch: counted tokens or sequences."""
    return int((completion_mask != 0).sum()) if loss_type in ("dapo", "bnpo") else completion_mask.shape[0]


def _difference(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """a - b where counted, 0 elsewhere, within ±20."""
    return (a.masked_fill(~mask, 0) - b.masked_fill(~mask, 0)).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def _importance_ratio(log_ratio: Tensor, mask: Tensor, level: str) -> Tensor:
    """(B, T): each token's own, or that of its sequence."""
    if level == "token":
        return log_ratio.exp()
    mean = log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    if level == "sequence":
        return mean.exp().expand_as(log_ratio)
    return (mean.detach() + log_ratio - log_ratio.detach()).exp()


def _aggregate(
    per_token_loss: Tensor, mask: Tensor, loss_type: str, max_completion_length: int | None, num_items: int | None
) -> Tensor:
    items = max(1, loss_items(loss_type, mask) if num_items is None else num_items)
    if loss_type == "grpo":
        return (per_token_loss.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum() / items
    if loss_type == "dr_grpo":
        return per_token_loss.sum() / (items * (max_completion_length or 1))
    return per_token_loss.sum() / items


def _ratio_metrics(ratio: Tensor, A: Tensor, mask: Tensor, epsilon: float, high: float) -> dict[str, float]:
    counted = ratio[mask] if mask.any() else ratio.new_ones(1)
    return {
        "tokens": int(mask.sum()),
        "clip_ratio/low": _mean((ratio < 1 - epsilon) & (A < 0), mask),
        "clip_ratio/high": _mean((ratio > 1 + high) & (A > 0), mask),
        "ratio/mean": float(counted.mean()),
        "ratio/min": float(counted.min()),
        "ratio/max": float(counted.max()),
    }


def _mean(x: Tensor, mask: Tensor) -> float:
    return float((x * mask).sum() / mask.sum().clamp(min=1))


def _check(
    loss_type: str, level: str, epsilon: float, high: float, delta: float | None, max_completion_length: int | None
) -> None:
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}")
    if level not in LEVELS:
        raise ValueError(f"importance_sampling_level must be one of {', '.join(LEVELS)}, got {level!r}")
    if not (0 <= epsilon < 1 and high >= 0):
        raise ValueError(f"epsilon must lie in [0, 1) and epsilon_high be at least 0, got {epsilon} and {high}")
    if delta is not None and delta <= 1 + high:
        raise ValueError(f"delta must be above 1 + epsilon_high = {1 + high:g}, got {delta}")
    if loss_type == "dr_grpo" and not max_completion_length:
        raise ValueError("loss_type dr_grpo divides by max_completion_length, which is not given")
