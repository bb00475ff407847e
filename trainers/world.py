"""The world: how many processes train together, and which one this is. Alone, every function here does nothing.

    torchrun --nproc-per-node 2 qlora.py sft --data rows.jsonl --out runs/two

Under torchrun each rank sees its share of a global batch. Losses are divided by the token count of the whole window
over all ranks, so gradients are summed, not averaged. Files are written by rank 0 only.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

Row = TypeVar("Row")


@contextmanager
def joined() -> Iterator[None]:
    """Meet the other processes that torchrun started, and part from them at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    join()
    try:
        yield
    finally:
        dist.destroy_process_group()


def join(**meeting: Any) -> None:
    """Meet the other processes: where torchrun says, or as `meeting` says to torch's init_process_group."""
    # Imported while a group lives, this keeps it (in default arguments), and gloo's threads, which can abort the exit.
    import torch.distributed.nn

    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", **meeting)


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


def any_in_world(here: bool) -> bool:
    """Whether it is so on any rank."""
    return sum_over_world(float(here)) > 0


def seed_rank(seed: int, step: int) -> None:
    """Random numbers of this step (dropout) that are not those of another rank: a function of seed, rank and step.

    Rank 0 goes on with the state that torch is in, which checkpoints keep.
    """
    if rank() > 0:
        digest = hashlib.sha256(f"{seed} {rank()} {step}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


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
