"""Exercise 7: one step of AdamW. Notebook: 07_paged_adamw.ipynb. Grade: qlora grade 7"""

from torch import Tensor


def adamw_step(
    p: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    t: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(p, exp_avg, exp_avg_sq) after step t, which is counted from 1. All tensors have one shape and are float64.

    - Decoupled weight decay, first: p shrinks by the factor 1 - lr · weight_decay. It never enters the moments.
    - exp_avg and exp_avg_sq are moving averages of g and of g². They began at 0, and what is returned of them is as it
      is: uncorrected.
    - p moves by -lr · m̂ / (√v̂ + eps), with m̂ and v̂ the moments corrected for their start at 0.

    Not to be used: torch.optim, this repository's packages.
    """
    # the exercise: this part is the reader's to write, and `qlora grade 7` says so until it is
    raise NotImplementedError("decay p, update both moments, correct them for their start, and move p")
