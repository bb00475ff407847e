"""Solution 11: GRPO's advantages and loss. Notebook: 11_grpo_gspo.ipynb. Grade: qlora grade 11"""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, num_generations: int) -> Tensor:
    """(r - mean) / (std + 1e-4) within each group: float64 (B,) → (B,).

    The rewards stand prompt by prompt: the first num_generations belong to the first prompt, and so on. std is the
    sample's, with num_generations - 1. A group whose rewards are all equal has advantages 0.

    Not to be used: this repository's packages.
    """
    groups = rewards.view(-1, num_generations)
    mean, std = groups.mean(dim=1, keepdim=True), groups.std(dim=1, keepdim=True)  # torch's std has n - 1
    return ((groups - mean) / (std + 1e-4)).flatten()


def grpo_loss(
    per_token_logps: Tensor, old_per_token_logps: Tensor, advantages: Tensor, completion_mask: Tensor, epsilon: float
) -> Tensor:
    """The clipped loss of B completions, a scalar tensor: the mean of all counted tokens' (DAPO's aggregation).

    per_token_logps, old_per_token_logps: float64 (B, T). advantages (B,). completion_mask: int64 (B, T), 1 = counts;
    elsewhere the log-probabilities mean nothing.

    - ratio = exp(logp - old logp), each token's own.
    - A token's loss is -min(ratio · A, clip(ratio, 1 - epsilon, 1 + epsilon) · A).

    Not to be used: this repository's packages.
    """
    ratio = torch.exp(per_token_logps - old_per_token_logps)
    A = advantages[:, None]
    per_token_loss = -torch.min(ratio * A, ratio.clamp(1 - epsilon, 1 + epsilon) * A)
    return (per_token_loss * completion_mask).sum() / completion_mask.sum()
