"""Exercise 8: the loss of a window of micro-batches. Notebook: 08_sft_masks.ipynb. Grade: qlora grade 8"""

from torch import Tensor


def window_loss(nlls: list[Tensor], masks: list[Tensor]) -> Tensor:
    """The mean nll of all counted tokens of one update, a scalar tensor.

    nlls: one float64 (B, T-1) a micro-batch. nll[b, t] is -log p(token t+1 | tokens ≤ t), the prediction made at t.
    masks: one int64 (B, T) a micro-batch: completion_mask, 1 where a token is learnt. B and T differ among
    micro-batches.

    - A token counts by its own mask. The first token of a row has no prediction, so it never counts.
    - Every counted token of the window weighs the same, whichever micro-batch it is in.
    - A window without a counted token has loss 0.

    Not to be used: this repository's packages.
    """
    # the exercise: this part is the reader's to write, and `qlora grade 8` says so until it is
    raise NotImplementedError("add up the nll of the counted tokens of all micro-batches, and divide once")
