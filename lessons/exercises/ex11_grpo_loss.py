"""Exercise 11: GRPO's advantages and loss. Notebook: 11_grpo_gspo.ipynb. Grade: qlora grade 11"""

from torch import Tensor


def group_advantages(rewards: Tensor, num_generations: int) -> Tensor:
    """(r - mean) / (std + 1e-4) within each group: float64 (B,) → (B,).

    The rewards stand prompt by prompt: the first num_generations belong to the first prompt, and so on. std is the
    sample's, with num_generations - 1. A group whose rewards are all equal has advantages 0.

    Not to be used: this repository's packages.
    """
    # the exercise: this part is the reader's to write, and `qlora grade 11` says so until it is
    raise NotImplementedError("one row a group, then mean and std of each row")


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
    # the exercise: this part is the reader's to write, and `qlora grade 11` says so until it is
    raise NotImplementedError(
        "ratios, both products, the smaller of them, its negative, and the mean of counted tokens"
    )
