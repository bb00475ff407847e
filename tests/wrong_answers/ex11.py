from typing import Any

import torch
from torch import Tensor

from . import Wrong


def advantages(rewards: Tensor, G: int, how: str) -> Tensor:
    """One right answer, spoilt on request; not the check's code."""
    out = torch.zeros_like(rewards)
    n_groups = len(rewards) // G
    for number in range(n_groups):
        at = range(number, len(rewards), n_groups) if how == "strided" else range(number * G, (number + 1) * G)
        own = rewards[list(at)]
        mean = rewards.mean() if how == "batch" else own.mean()
        spread = rewards if how in ("batch", "batch std") else own
        std = spread.std(correction=0 if how == "population" else 1) + (0 if how == "no eps" else 1e-4)
        out[list(at)] = (own - (0 if how == "not centred" else mean)) / (1 if how == "not scaled" else std)
    return out.view(-1, G) if how == "shape" else out


def loss(logps: Tensor, old: Tensor, A: Tensor, mask: Tensor, eps: float, how: str) -> Tensor:
    """The same for the loss, token by token."""
    rows: list[list[Tensor]] = []
    for row in range(len(logps)):
        tokens = []
        for t in range(logps.shape[1]):
            if not mask[row, t] and how != "unmasked":
                continue
            difference = logps[row, t] - old[row, t]
            ratio = {"no exp": difference, "inverted": torch.exp(-difference)}.get(how, torch.exp(difference))
            low = torch.clamp(ratio, 1 - eps, 1 + eps)
            gains = (ratio * A[row], low * A[row])
            gain = {"max": max(gains), "clipped alone": gains[1], "unclipped": gains[0]}.get(how, min(gains))
            if how in ("ratio min", "no advantage"):
                gain = min(ratio, low) * (A[row] if how == "ratio min" else 1)
            tokens.append(gain if how == "sign" else -gain)
        rows.append(tokens)
    every = torch.stack([token for tokens in rows for token in tokens])
    if how == "sequences":
        return torch.stack([torch.stack(tokens).mean() for tokens in rows]).mean()
    return {"sum": every.sum(), "divided by all": every.sum() / mask.numel()}.get(how, every.mean())


ADVANTAGES = {
    "population": "the population's std",
    "no eps": "1e-4 is missing",
    "not scaled": "not divided by the std",
    "batch": "mean and std of the whole batch",
    "batch std": "the std of the whole batch",
    "not centred": "the mean of the group is not subtracted",
    "strided": "the groups are taken with a stride",
    "shape": "flatten the groups",
}
LOSSES = {
    "max": "max in the place of min",
    "no exp": "Take exp",
    "inverted": "the ratio is old to new",
    "clipped alone": "the clipped product alone",
    "unclipped": "nothing is clipped",
    "ratio min": "Multiply by A first",
    "sign": "the sign is missing",
    "no advantage": "the advantages are not in it",
    "unmasked": "masked tokens are in the mean",
    "divided by all": "the divisor is not",
    "sequences": "a mean of the completions' means",
    "sum": "the sum is not divided",
}


def spoilt(name: str, function: Any, how: str, hint: str) -> Wrong:
    def answer(*arguments: Any) -> Tensor:
        return function(*arguments, how)

    answer.__name__ = how.replace(" ", "_")
    return Wrong(hint, {name: answer})


WRONG = [
    *(spoilt("group_advantages", advantages, how, hint) for how, hint in ADVANTAGES.items()),
    *(spoilt("grpo_loss", loss, how, hint) for how, hint in LOSSES.items()),
]
