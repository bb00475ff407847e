"""How close is close enough: at most twice the error that the same math has in plain PyTorch in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def error(actual: Tensor, exact: Tensor) -> float:
    """Euclidean distance from the float64 result."""
    assert exact.dtype == torch.float64
    assert actual.shape == exact.shape
    return (actual.detach().double() - exact).norm().item()


def assert_as_accurate_as(plain: Tensor, actual: Tensor, exact: Tensor) -> None:
    """`plain` and `actual` are two results in one dtype, `exact` is the float64 result."""
    assert actual.dtype == plain.dtype
    measured, allowed = error(actual, exact), 2 * error(plain, exact)
    assert measured <= allowed, f"error {measured:.3g} exceeds twice that of plain PyTorch, {allowed:.3g}"


def leaf(tensor: Tensor) -> Tensor:
    """A copy that collects a gradient."""
    return tensor.detach().clone().requires_grad_()


def exact(matrix: list) -> Tensor:
    """A result of tests/reference.py as a float64 tensor."""
    return torch.tensor(matrix, dtype=torch.float64)
