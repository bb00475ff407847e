"""Exercise 11: group advantages and the clipped loss, against trainers.grpo."""

import torch
from torch import Tensor

from lessons.grading import Case, Forbidden, Mistake
from trainers.grpo import group_advantages, grpo_loss

TITLE = "GRPO's advantages and clipped loss"
VERSION = 1
MUST_NOT_USE = (Forbidden("trainers", "it is what you are writing"),)
RTOL = 64 * torch.finfo(torch.float64).eps
FP32 = 2 * torch.finfo(torch.float32).eps
"""The repository's advantages are rounded to fp32."""

POPULATION = "the population's std, with n: here it is the sample's, with n - 1"
NO_EPS = "1e-4 is missing: a group of equal rewards has std 0, and 0 / 0 is NaN"
NOT_SCALED = "the rewards are centred and not divided by the std of their group (Dr. GRPO does that; this is GRPO)"
BATCH = "mean and std of the whole batch: an advantage says how much better than its own group a completion is"
BATCH_STD = "the std of the whole batch: divide by that of the group"
NOT_CENTRED = "the mean of the group is not subtracted"
STRIDED = (
    "the groups are taken with a stride: the first num_generations rewards belong together, view(-1, num_generations)"
)
SHAPE = "one advantage a completion, (B,): flatten the groups"

MAX = "max in the place of min: it takes the larger gain, so that clipping never binds where it should"
NO_EXP = "the ratio is logp - old logp: its logarithm. Take exp"
INVERTED = "the ratio is old to new: exp(logp - old logp)"
CLIPPED_ALONE = "the clipped product alone: where A is negative and the ratio large, min keeps the unclipped one"
UNCLIPPED = "nothing is clipped"
RATIO_MIN = "min(ratio, clip) · A: for negative A that is the larger product. Multiply by A first, then take min"
SIGN = "the sign is missing: what is maximised is min(…), the loss is its negative"
UNMASKED = "masked tokens are in the mean: only those whose mask is 1 count"
DIVIDED_BY_ALL = (
    "the sum is right and the divisor is not: divide by the number of counted tokens, completion_mask.sum()"
)
SEQUENCES = "a mean of the completions' means (loss_type grpo): here each counted token weighs the same (dapo)"
SUM = "the sum is not divided by the number of counted tokens"
NO_ADVANTAGE = "the advantages are not in it"


def wrong_advantages(rewards: Tensor, G: int) -> list[Mistake]:
    groups = rewards.view(-1, G)
    mean, std = groups.mean(1, keepdim=True), groups.std(1, keepdim=True)
    strided = rewards.view(G, -1).T
    right = (groups - mean) / (std + 1e-4)
    values = [
        (POPULATION, (groups - mean) / (groups.std(1, keepdim=True, correction=0) + 1e-4)),
        (NOT_SCALED, groups - mean),
        (BATCH, (groups - groups.mean()) / (groups.std() + 1e-4)),
        (BATCH_STD, (groups - mean) / (groups.std() + 1e-4)),
        (NOT_CENTRED, groups / (std + 1e-4)),
        (STRIDED, ((strided - strided.mean(1, keepdim=True)) / (strided.std(1, keepdim=True) + 1e-4)).T),
        (NO_EPS, (groups - mean) / std),
    ]
    return [*(Mistake(hint, value.flatten()) for hint, value in values), Mistake(SHAPE, right)]


def wrong_losses(logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, epsilon: float) -> list[Mistake]:
    A, log_ratio = advantages[:, None], logps - old
    ratio = log_ratio.exp()
    n, n_rows = mask.sum(), mask.sum(1)

    def clipped(ratio: Tensor) -> Tensor:
        return ratio.clamp(1 - epsilon, 1 + epsilon)

    def loss(per_token: Tensor) -> Tensor:
        return (per_token * mask).sum() / n

    right = -torch.min(ratio * A, clipped(ratio) * A)
    values = [
        (MAX, loss(-torch.max(ratio * A, clipped(ratio) * A))),
        (NO_EXP, loss(-torch.min(log_ratio * A, clipped(log_ratio) * A))),
        (INVERTED, loss(-torch.min(A / ratio, clipped(1 / ratio) * A))),
        (CLIPPED_ALONE, loss(-clipped(ratio) * A)),
        (UNCLIPPED, loss(-ratio * A)),
        (RATIO_MIN, loss(-torch.min(ratio, clipped(ratio)) * A)),
        (SIGN, -loss(right)),
        (NO_ADVANTAGE, loss(-torch.min(ratio, clipped(ratio)))),
        (UNMASKED, right.mean()),
        (DIVIDED_BY_ALL, (right * mask).mean()),
        (SEQUENCES, ((right * mask).sum(1) / n_rows).mean()),
        (SUM, (right * mask).sum()),
    ]
    return [Mistake(hint, value) for hint, value in values]


def cases() -> list[Case]:
    generator = torch.Generator().manual_seed(11)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rewards = {
        "advantages of three groups of four": (random(12), 4),
        "of two groups, a fraction right": (torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 1]).double(), 4),
        "of a group in which all are right": (torch.tensor([1.0, 1, 1, 0, 1, 0]).double(), 3),
    }
    found = [
        Case(
            name,
            lambda student, call=call: student("group_advantages", *call),
            group_advantages(*call).double(),
            wrong_advantages(*call),
            rtol=FP32,
            atol=FP32,
        )
        for name, call in rewards.items()
    ]
    mask = (torch.arange(7) < torch.tensor([2, 7, 4, 5])[:, None]).long()
    old, advantages = -random(4, 7).abs(), torch.tensor([1.5, -0.5, -1.2, 0.2]).double()
    near = old + 0.05 * random(4, 7)
    far = old + random(4, 7)
    losses = {
        "the loss near the old policy": (near, old, advantages, mask, 0.2),
        "the loss far from it": (far, old, advantages, mask, 0.2),
        "a narrow clip": (near, old, advantages, mask, 0.01),
    }
    for name, call in losses.items():
        right, _ = grpo_loss(*call[:4], epsilon=call[4])
        found.append(
            Case(name, lambda student, call=call: student("grpo_loss", *call), right, wrong_losses(*call), rtol=RTOL)
        )
    return found
