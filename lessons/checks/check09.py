"""Exercise 9: DPO with label smoothing, against trainers.dpo.dpo_loss."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lessons.grading import Case, Forbidden, Mistake
from trainers.dpo import dpo_loss
from trainers.logprobs import sequence_logps

TITLE = "DPO's loss with label smoothing"
VERSION = 1
MUST_NOT_USE = (Forbidden("trainers", "it is what you are writing"),)
RTOL = 64 * torch.finfo(torch.float64).eps

NO_REFERENCE = "the reference is forgotten: s is log π - log π_ref, so that the first step has margin 0 and loss ln 2"
SWAPPED = (
    "the margin has the wrong sign, so that the rejected answers are taught: chosen and rejected are swapped, or "
    "policy and reference, or the weights ε and 1 - ε"
)
REFERENCE_ADDED = "the reference is added: s is log π - log π_ref"
MEAN = "means over tokens and not sums: log π(y) of an answer is the sum of its tokens' log-probabilities"
UNMASKED = "masked tokens are in the sum: only those whose mask is 1 belong to the answer"
BETA_OUTSIDE = "beta multiplies the logarithm: it belongs inside, -log σ(β · margin)"
NO_BETA = "beta is forgotten: the margin is β · (s_c - s_r)"
NO_SMOOTHING = "label_smoothing is forgotten: a share ε of the labels is taken to be wrong"
SMOOTHING_ADDED = "the first term weighs 1: with label smoothing it weighs 1 - ε"
OVERFLOW = "log(sigmoid(x)) is -inf where sigmoid(x) has underflown: torch.nn.functional.logsigmoid stays finite"
MEAN_OF_PAIRS = "one number for all pairs: return each pair's loss, (B,)"
NEGATIVE = "the sign is missing: the loss is -log σ, which is above 0"


def wrong(
    pc: Tensor, pr: Tensor, rc: Tensor, rr: Tensor, cm: Tensor, rm: Tensor, beta: float, eps: float
) -> list[Mistake]:
    sums = [sequence_logps(logps, mask) for logps, mask in ((pc, cm), (pr, rm), (rc, cm), (rr, rm))]
    means = [s / mask.sum(1) for s, mask in zip(sums, (cm, rm, cm, rm), strict=True)]
    bare = [logps.sum(1) for logps in (pc, pr, rc, rr)]

    def loss(c: Tensor, r: Tensor, ref_c: Tensor, ref_r: Tensor, beta: float = beta, eps: float = eps) -> Tensor:
        return dpo_loss(c, r, ref_c, ref_r, beta=beta, label_smoothing=eps)[0]

    c, r, ref_c, ref_r = sums
    zero, delta = torch.zeros_like(c), (c - ref_c) - (r - ref_r)
    right = loss(*sums)
    naive = -(1 - eps) * torch.log(torch.sigmoid(beta * delta)) - eps * torch.log(torch.sigmoid(-beta * delta))
    outside = beta * loss(*sums, beta=1.0)
    values = [
        (NO_REFERENCE, loss(c, r, zero, zero)),
        (SWAPPED, loss(r, c, ref_r, ref_c)),
        (REFERENCE_ADDED, loss(c, r, -ref_c, -ref_r)),
        (MEAN, loss(*means)),
        (MEAN, loss(*(logps.mean(1) for logps in (pc, pr, rc, rr)))),
        (UNMASKED, loss(*bare)),
        (BETA_OUTSIDE, outside),
        (NO_BETA, loss(*sums, beta=1.0)),
        (NO_SMOOTHING, loss(*sums, eps=0.0)),
        (SMOOTHING_ADDED, -logsigmoid(beta * delta) - eps * logsigmoid(-beta * delta)),
        (OVERFLOW, lambda got: not torch.isfinite(got).all()),
        (OVERFLOW, naive),
        (MEAN_OF_PAIRS, right.mean()),
        (NEGATIVE, -right),
    ]
    return [Mistake(hint, value) for hint, value in values]


def expected(pc: Tensor, pr: Tensor, rc: Tensor, rr: Tensor, cm: Tensor, rm: Tensor, beta: float, eps: float) -> Tensor:
    sums = [sequence_logps(logps, mask) for logps, mask in ((pc, cm), (pr, rm), (rc, cm), (rr, rm))]
    return dpo_loss(*sums, beta=beta, label_smoothing=eps)[0]


def cases() -> list[Case]:
    generator = torch.Generator().manual_seed(9)

    def logps(like: Tensor, scale: float = 1.0) -> Tensor:
        return -scale * torch.rand(like.shape, generator=generator, dtype=torch.float64)

    def mask(lengths: list[int], T: int) -> Tensor:
        """Two tokens of a prompt, then answers of these lengths."""
        at = torch.arange(T)
        return ((at >= 2) & (at < 2 + torch.tensor(lengths)[:, None])).long()

    cm, rm = mask([3, 6, 4], 9), mask([7, 2, 5], 10)
    policy, reference = (logps(cm), logps(rm)), (logps(cm), logps(rm))
    far = (logps(cm, 2000.0), logps(rm, 0.1))
    inputs = {
        "the first step: the policy is the reference": (*policy, *policy, cm, rm, 0.1, 0.0),
        "three pairs": (*policy, *reference, cm, rm, 0.3, 0.0),
        "label smoothing 0.2": (*policy, *reference, cm, rm, 0.3, 0.2),
        "a margin of some thousand": (*far, *reference, cm, rm, 1.0, 0.0),
    }
    return [
        Case(name, lambda student, call=call: student("dpo_loss", *call), expected(*call), wrong(*call), rtol=RTOL)
        for name, call in inputs.items()
    ]
