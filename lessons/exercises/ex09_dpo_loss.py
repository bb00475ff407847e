"""Exercise 9: DPO's loss with label smoothing. Notebook: 09_dpo_orpo.ipynb. Grade: qlora grade 9"""

from torch import Tensor


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """-(1 - ε) · log σ(β · (s_c - s_r)) - ε · log σ(-β · (s_c - s_r)) of each pair, (B,). ε is label_smoothing.

    policy_chosen, ref_chosen: float64 (B, T), log-probability of each token under policy and reference; chosen_mask:
    int64 (B, T), 1 on the answer's tokens. The same for the rejected answers, whose T is another. What stands where a
    mask is 0 means nothing.

    - s_c = log π(y_c) - log π_ref(y_c): sums over the answer's tokens. s_r is the same of the rejected answer.
    - The loss must stay finite for margins of any size.

    Not to be used: this repository's packages.
    """
    # the exercise: this part is the reader's to write, and `qlora grade 9` says so until it is
    raise NotImplementedError(
        "sum the masked log-probabilities, take policy minus reference, then chosen minus rejected"
    )
