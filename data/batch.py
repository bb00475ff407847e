"""Examples become batches: which rows a step takes, and how they are padded into one tensor.

    epoch e         a permutation of the n rows, a pure function of (n, seed, e): the order of n Philox random numbers
    global step s   the rows at positions s·B … s·B + B − 1 of epoch 0, epoch 1, … laid end to end

So within an epoch no row is lost or taken twice, a batch may hold the end of one epoch and the start of the next, and
a run resumes anywhere from the step's number alone. The B rows of a step are those of the whole world.

    B rows of a batch, T tokens of its longest row. Rows are padded on the right.

segment_ids say what is padding (0) and what is text (1): never the pad id, which is EOS in many models.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .encode import Encoded


class Batch(NamedTuple):
    """What a model and a loss need, all int64 (B, T)."""

    input_ids: Tensor
    completion_mask: Tensor  # 1 = learnt
    segment_ids: Tensor  # 0 = padding, 1 = text


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of rows 0 … n − 1 in an epoch. The same everywhere: Philox's bits are fixed."""
    return list(_order(n, seed, epoch))


def step_rows(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The `batch_size` row numbers of global step `step` (from 0).

    Raises ValueError when n or batch_size is below 1, or step below 0.
    """
    if n < 1 or batch_size < 1 or step < 0:
        raise ValueError(f"need n ≥ 1, batch_size ≥ 1 and step ≥ 0, got {n}, {batch_size} and {step}")
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [_order(n, seed, position // n)[position % n] for position in positions]


def collate(examples: Sequence[Encoded], *, pad_id: int) -> Batch:
    """B examples → tensors (B, T) padded on the right: pad_id, mask 0, segment 0. Raises ValueError for B = 0."""
    if not examples:
        raise ValueError("a batch needs at least one example")
    longest = max(len(example.ids) for example in examples)
    input_ids = torch.full((len(examples), longest), pad_id, dtype=torch.int64)
    completion_mask = torch.zeros_like(input_ids)
    segment_ids = torch.zeros_like(input_ids)
    for row, example in enumerate(examples):
        length = len(example.ids)
        input_ids[row, :length] = torch.tensor(example.ids)
        completion_mask[row, :length] = torch.tensor(example.completion_mask)
        segment_ids[row, :length] = 1
    return Batch(input_ids, completion_mask, segment_ids)


@lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    return tuple(np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable").tolist())
