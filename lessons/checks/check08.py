"""Exercise 8: the loss of a window, against trainers.sft.sft_loss."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lessons.grading import Case, Forbidden, Mistake
from lessons.grading.cases import Student
from trainers.sft import sft_loss

TITLE = "the loss of a window of micro-batches"
VERSION = 1
MUST_NOT_USE = (Forbidden("trainers", "it is what you are writing"),)
RTOL = 64 * torch.finfo(torch.float64).eps

SHIFTED = "the mask is one place off: nll[:, t] is of token t+1, so it goes with mask[:, 1:], not with mask[:, :-1]"
UNMASKED = "masked tokens are counted, prompts and padding: only those whose mask is 1 count"
DIVIDED_BY_ALL = "the sum is right and the divisor is not: it counts masked tokens too. Divide by the sum of the masks"
FIRST_COUNTED = "the first token of a row is counted in the divisor: it has no prediction. Sum mask[:, 1:]"
NOT_DIVIDED = "the sum is not divided by the number of counted tokens"
MEAN_OF_MEANS = (
    "a mean of means: the mean of each micro-batch, averaged. A token in a small one weighs more. Add up sums and "
    "counts over the window, and divide once"
)
EMPTY_LEFT_OUT = "a mean of the means of those micro-batches that have a counted token: it is a mean of means still"
MEAN_OF_ROWS = "a mean of the rows' means: a token of a short row weighs more. Add up sums and counts, and divide once"
SUM_OF_MEANS = "the means of the micro-batches are added up: with 8 micro-batches the loss is 8 times too large"
NAN = "0 / 0: a window or a micro-batch without a counted token gives NaN. Its loss is 0"


def expected(nlls: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    num_items = sum(int(mask[:, 1:].sum()) for mask in masks)
    return torch.stack([sft_loss(nll, mask, num_items) for nll, mask in zip(nlls, masks, strict=True)]).sum()


def wrong(nlls: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Mistake]:
    own = [mask[:, 1:] for mask in masks]
    off = [mask[:, :-1] for mask in masks]

    def total(of: Sequence[Tensor]) -> Tensor:
        return torch.stack([(nll * mask).sum() for nll, mask in zip(nlls, of, strict=True)]).sum()

    def count(of: Sequence[Tensor]) -> int:
        return sum(int(mask.sum()) for mask in of)

    n_all = sum(nll.numel() for nll in nlls)
    means = torch.stack([(nll * mask).sum() / mask.sum() for nll, mask in zip(nlls, own, strict=True)])
    rows = torch.cat([(nll * mask).sum(1) / mask.sum(1) for nll, mask in zip(nlls, own, strict=True)])
    filled = means.nan_to_num(0.0)
    values = [
        (UNMASKED, total([torch.ones_like(nll) for nll in nlls]) / n_all),
        (UNMASKED, torch.stack([nll.mean() for nll in nlls]).mean()),
        (SHIFTED, total(off) / max(1, count(off))),
        (FIRST_COUNTED, total(own) / max(1, count(masks))),
        (DIVIDED_BY_ALL, total(own) / n_all),
        (NOT_DIVIDED, total(own)),
        (NAN, torch.tensor(torch.nan, dtype=torch.float64)),
        (MEAN_OF_MEANS, filled.mean()),
        (EMPTY_LEFT_OUT, means.nanmean()),
        (MEAN_OF_ROWS, rows.nan_to_num(0.0).mean()),
        (MEAN_OF_ROWS, rows.nanmean()),
        (SUM_OF_MEANS, filled.sum()),
    ]
    return [Mistake(hint, value) for hint, value in values]


def cases() -> list[Case]:
    generator = torch.Generator().manual_seed(8)

    def batch(*lengths: tuple[int, int], learn_first: bool = False) -> tuple[Tensor, Tensor]:
        """Rows of a masked prompt and a learnt answer of these lengths, padded to the longest."""
        T = max(prompt + answer for prompt, answer in lengths)
        mask = torch.zeros(len(lengths), T, dtype=torch.int64)
        for row, (prompt, answer) in enumerate(lengths):
            mask[row, prompt : prompt + answer] = 1
        mask[:, 0] |= int(learn_first)
        return torch.rand(len(lengths), T - 1, generator=generator, dtype=torch.float64) + 0.5, mask

    one, few, none = batch((3, 4), (5, 2)), batch((2, 3)), batch((6, 0), (4, 0))
    windows = {
        "one micro-batch": [one],
        "every token learnt, the first too": [batch((0, 6), (0, 6), learn_first=True)],
        "unequal micro-batches": [one, few, batch((2, 30), (1, 17))],
        "a micro-batch without a counted token": [one, none, batch((1, 9))],
        "a window without one": [none],
    }
    return [_case(name, *map(list, zip(*window, strict=True))) for name, window in windows.items()]


def _case(name: str, nlls: list[Tensor], masks: list[Tensor]) -> Case:
    def ask(student: Student) -> Any:
        return student("window_loss", nlls, masks)

    return Case(name, ask, expected(nlls, masks), wrong(nlls, masks), rtol=RTOL)
