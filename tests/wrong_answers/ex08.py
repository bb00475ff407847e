import torch
from torch import Tensor

from . import Wrong

Tensors = list[Tensor]


def mean_of_means(nlls: Tensors, masks: Tensors) -> Tensor:
    means = [(n * m[:, 1:]).sum() / m[:, 1:].sum().clamp(min=1) for n, m in zip(nlls, masks, strict=True)]
    return sum(means) / len(means)


def unguarded_means(nlls: Tensors, masks: Tensors) -> Tensor:
    means = [n[m[:, 1:] == 1].mean() for n, m in zip(nlls, masks, strict=True) if m[:, 1:].any()]
    return torch.stack(means or [torch.zeros((), dtype=torch.float64)]).mean()


def added_means(nlls: Tensors, masks: Tensors) -> Tensor:
    return mean_of_means(nlls, masks) * len(nlls)


def mean_of_rows(nlls: Tensors, masks: Tensors) -> Tensor:
    rows = [(n * m[:, 1:]).sum(1) / m[:, 1:].sum(1).clamp(min=1) for n, m in zip(nlls, masks, strict=True)]
    return torch.cat(rows).mean()


def everything(nlls: Tensors, masks: Tensors) -> Tensor:
    return torch.cat([nll.flatten() for nll in nlls]).mean()


def off_by_one(nlls: Tensors, masks: Tensors) -> Tensor:
    picked = torch.cat([nll[mask[:, :-1] == 1] for nll, mask in zip(nlls, masks, strict=True)])
    return picked.sum() / max(1, len(picked))


def first_counted(nlls: Tensors, masks: Tensors) -> Tensor:
    total = sum((nll * mask[:, 1:]).sum() for nll, mask in zip(nlls, masks, strict=True))
    return total / max(1, sum(int(mask.sum()) for mask in masks))


def divided_by_all(nlls: Tensors, masks: Tensors) -> Tensor:
    total = sum((nll * mask[:, 1:]).sum() for nll, mask in zip(nlls, masks, strict=True))
    return total / sum(nll.numel() for nll in nlls)


def not_divided(nlls: Tensors, masks: Tensors) -> Tensor:
    return sum((nll * mask[:, 1:]).sum() for nll, mask in zip(nlls, masks, strict=True))


def nothing_is_nan(nlls: Tensors, masks: Tensors) -> Tensor:
    return torch.cat([nll[mask[:, 1:] == 1] for nll, mask in zip(nlls, masks, strict=True)]).mean()


def a_float(nlls: Tensors, masks: Tensors) -> float:
    return float(nothing_is_nan(nlls, masks))


WRONG = [
    Wrong("a mean of means", {"window_loss": mean_of_means}),
    Wrong("a mean of means", {"window_loss": unguarded_means}),
    Wrong("are added up", {"window_loss": added_means}),
    Wrong("a mean of the rows' means", {"window_loss": mean_of_rows}),
    Wrong("masked tokens are counted", {"window_loss": everything}),
    Wrong("the mask is one place off", {"window_loss": off_by_one}),
    Wrong("the first token of a row is counted in the divisor", {"window_loss": first_counted}),
    Wrong("the divisor is not", {"window_loss": divided_by_all}),
    Wrong("not divided", {"window_loss": not_divided}),
    Wrong("0 / 0", {"window_loss": nothing_is_nan}),
    Wrong("must be a tensor", {"window_loss": a_float}),
]
