from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from . import Wrong


def loss(pc: Tensor, pr: Tensor, rc: Tensor, rr: Tensor, cm: Tensor, rm: Tensor, beta: float, eps: float, how: str):
    """One right answer, spoilt on request; not the check's code."""

    def of(logps: Tensor, mask: Tensor) -> Tensor:
        if how == "unmasked":
            return logps.sum(1)
        return torch.stack(
            [x[m == 1].mean() if how == "mean" else x[m == 1].sum() for x, m in zip(logps, mask, strict=True)]
        )

    c, r, ref_c, ref_r = of(pc, cm), of(pr, rm), of(rc, cm), of(rr, rm)
    if how == "no reference":
        ref_c = ref_r = torch.zeros(())
    delta = (c - r) + (ref_c - ref_r) * (1 if how == "added" else -1)
    if how in ("swapped", "reference swapped"):
        delta = -delta
    inner = 1.0 if how in ("beta outside", "no beta") else beta
    log_sigmoid = (lambda x: torch.log(1 / (1 + torch.exp(-x)))) if how == "naive" else logsigmoid
    if how == "no smoothing":
        eps = 0.0
    first, second = (
        (eps, 1 - eps) if how == "smoothing swapped" else (1.0 if how == "smoothing added" else 1 - eps, eps)
    )
    out = -first * log_sigmoid(inner * delta) - second * log_sigmoid(-inner * delta)
    out = out * {"beta outside": beta, "negative": -1}.get(how, 1)
    return out.mean() if how == "one number" else out


HINTS = {
    "no reference": "the reference is forgotten",
    "swapped": "the margin has the wrong sign",
    "reference swapped": "or policy and reference",
    "added": "the reference is added",
    "mean": "means over tokens and not sums",
    "unmasked": "masked tokens are in the sum",
    "beta outside": "beta multiplies the logarithm",
    "no beta": "beta is forgotten",
    "no smoothing": "label_smoothing is forgotten",
    "smoothing swapped": "or the weights ε and 1 - ε",
    "smoothing added": "the first term weighs 1",
    "naive": "logsigmoid stays finite",
    "one number": "return each pair's loss",
    "negative": "the sign is missing",
}


def spoilt(how: str) -> Wrong:
    def answer(*arguments: Any) -> Tensor:
        return loss(*arguments, how)

    answer.__name__ = how.replace(" ", "_")
    return Wrong(HINTS[how], {"dpo_loss": answer})


WRONG = list(map(spoilt, HINTS))
