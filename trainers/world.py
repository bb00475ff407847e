"""The world: how many processes train together, and which one this is. Alone, every function here does nothing.

Under torchrun each rank sees its share of a global batch. Losses are divided by the token count of the whole window
over all ranks, so gradients are summed, not averaged. Files are written by rank 0 only.
"""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

Row = TypeVar("Row")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process writes the files and draws the progress bar."""
    return rank() == 0


def my_rows(rows: Sequence[Row]) -> Sequence[Row]:
    """This rank's share of a global batch: every world_size-th row."""
    return rows[rank() :: world_size()]


def sum_over_world(value: float, device: torch.device | str = "cpu") -> float:
    """Σ over ranks of one number."""
    if world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total)


def wait_for_all() -> None:
    """Until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Σ over ranks of every gradient, in place."""
    if world_size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
