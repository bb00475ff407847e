"""Examples become tensors: one or several in a row, rows padded to the longest.

    B rows of a batch, T tokens of its longest row. Rows are padded on the right.

segment_ids say what is padding (0) and which example of the row a token belongs to (1, 2, …): never the pad id, which
is EOS in many models. An example's first token is never learnt from the example before it: its mask is 0 there.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .encode import Encoded


class Batch(NamedTuple):
    """What a model and a loss need, all int64 (B, T)."""

    input_ids: Tensor
    completion_mask: Tensor  # 1 = learnt
    segment_ids: Tensor  # 0 = padding, k = example k of the row, from 1


def collate(examples: Sequence[Encoded], *, pad_id: int) -> Batch:
    """B examples → tensors (B, T) padded on the right: pad_id, mask 0, segment 0. Raises ValueError for B = 0."""
    return collate_packed([[example] for example in examples], pad_id=pad_id)


def collate_packed(rows: Sequence[Sequence[Encoded]], *, pad_id: int) -> Batch:
    """B rows of examples laid end to end → tensors (B, T), padded as above. Raises ValueError for B = 0."""
    if not rows:
        raise ValueError("a batch needs at least one example")
    longest = max(sum(len(example.ids) for example in row) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    completion_mask = torch.zeros_like(input_ids)
    segment_ids = torch.zeros_like(input_ids)
    for r, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row, start=1):
            stop = start + len(example.ids)
            input_ids[r, start:stop] = torch.tensor(example.ids)
            completion_mask[r, start:stop] = torch.tensor(example.completion_mask)
            completion_mask[r, start] *= start == 0
            segment_ids[r, start:stop] = segment
            start = stop
    return Batch(input_ids, completion_mask, segment_ids)
