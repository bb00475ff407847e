"""Which examples a step trains on: in order, packed, or with others of like length.

    epoch e         the n examples in the order of n Philox random numbers: a function of (n, seed, e) alone
    global step s   the rows at positions s·W … s·W + W - 1 of epoch 0, epoch 1, … laid end to end

    W rows of one update, over all micro-batches and the whole world. A row is one example, or several packed.

So within an epoch no example is lost or taken twice, a window may hold the end of one epoch and the start of the next,
and a run resumes anywhere from the step's number alone. Two ways to pad less:

    packed      the examples of the epoch in rows of at most `capacity` tokens (packing.py), the rows shuffled
    grouped     pools of 4 to 50 micro-batches are sorted by length, cut into micro-batches of like length, and these
                shuffled (transformers' group_by_length has pools of 1 to 50). The first rows of an
                epoch complete the micro-batch in which the last one ended: the cuts stay where the trainer makes them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import TypeVar

import numpy as np

from .packing import pack

Row = TypeVar("Row")
POOL = 4, 50  # micro-batches in one, at least and at most
EXAMPLES, ROWS = 0, 1  # which random numbers of an epoch: those that order its examples, or its packed rows and groups


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of rows 0 … n - 1 in an epoch. The same everywhere: Philox's bits are fixed."""
    return list(_order(n, seed, epoch))


def step_rows(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The `batch_size` row numbers of global step `step` (from 0).

    Raises ValueError when n or batch_size is below 1, or step below 0.
    """
    return _step(lambda epoch: _order(n, seed, epoch), n, batch_size, step)


@dataclass(frozen=True, eq=False)
class DataOrder:
    """Rows of example numbers for every step. Raises ValueError when an example does not fit `capacity`."""

    lengths: Sequence[int]
    """Of every example, in tokens."""
    seed: int
    capacity: int | None = None
    """Pack examples into rows of this many tokens."""
    group: int | None = None
    """Rows that are padded together, the whole world's, to be of like length. Not with capacity."""

    def __str__(self) -> str:
        if self.capacity is not None:
            return f"{len(self.lengths):,} examples packed in {self.n_rows:,} rows of up to {self.capacity:,} tokens"
        return f"{len(self.lengths):,} rows, {'shuffled' if self.group is None else 'grouped by length'}"

    @property
    def n_rows(self) -> int:
        """Rows of an epoch: the same for each."""
        return len(self.epoch(0))

    def epoch(self, epoch: int) -> list[list[int]]:
        """Every example once: rows of example numbers."""
        return _epoch(self, epoch)

    def step(self, window: int, step: int) -> list[list[int]]:
        """The `window` rows of global step `step` (from 0)."""
        return _step(self.epoch, self.n_rows, window, step)

    def padding(self, batch_size: int) -> float:
        """The share of padding in the first epoch's tensors when `batch_size` rows are padded together."""
        lengths = [sum(self.lengths[i] for i in row) for row in self.epoch(0)]
        parts = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
        return 1 - sum(lengths) / sum(max(part) * len(part) for part in parts)


@lru_cache(maxsize=4)
def _epoch(order: DataOrder, epoch: int) -> list[list[int]]:
    examples = _order(len(order.lengths), order.seed, epoch)
    if order.capacity is not None:
        packed = pack(order.lengths, order.capacity, examples)
        return [packed[i] for i in _order(len(packed), order.seed, epoch, ROWS)]
    grouped = examples if order.group is None else _grouped(examples, order, order.group, epoch)
    return [[i] for i in grouped]


def _grouped(examples: Sequence[int], order: DataOrder, group: int, epoch: int) -> list[int]:
    """The examples of an epoch, those of a micro-batch alike in length."""
    begun = -epoch * len(examples) % group  # rows missing in the micro-batch that the last epoch began
    rest = examples[begun:]
    pool = group * min(max(len(rest) // (4 * group), POOL[0]), POOL[1])  # four pools, where that is not too few
    pools = [sorted(rest[start : start + pool], key=lambda i: -order.lengths[i]) for start in range(0, len(rest), pool)]
    groups = [part[start : start + group] for part in pools for start in range(0, len(part), group)]
    unfinished = groups.pop() if groups and len(groups[-1]) < group else []
    shuffled = (groups[i] for i in _order(len(groups), order.seed, epoch, ROWS))
    return [*examples[:begun], *chain.from_iterable(shuffled), *unfinished]


def _step(rows_of: Callable[[int], Sequence[Row]], n: int, window: int, step: int) -> list[Row]:
    if n < 1 or window < 1 or step < 0:
        raise ValueError(f"need n ≥ 1, batch_size ≥ 1 and step ≥ 0, got {n}, {window} and {step}")
    positions = range(step * window, (step + 1) * window)
    return [rows_of(position // n)[position % n] for position in positions]


@lru_cache(maxsize=8)
def _order(n: int, seed: int, epoch: int, stream: int = EXAMPLES) -> tuple[int, ...]:
    """A permutation of 0 … n - 1 from a stream of random numbers of the epoch."""
    key, counter = (np.array(words, dtype=np.uint64) for words in ([seed % 2**64, epoch], [0, 0, 0, stream]))
    return tuple(np.argsort(np.random.Philox(key=key, counter=counter).random_raw(n), kind="stable").tolist())
