"""Real text that lies on every machine: the Python language reference, as `help()` shows it (about 450 KB of English).

It is part of CPython, and differs a little from version to version; rows say which version they were measured with.
"""

import math
from collections.abc import Sequence
from pydoc_data.topics import topics  # type: ignore[import-untyped]  # of the standard library

import torch

from data import Batch
from models import Decoder
from trainers.logprobs import per_token_nll


def reference() -> str:
    """Every topic, in alphabetical order."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def rows_of(ids: Sequence[int], length: int, n: int | None = None) -> list[list[int]]:
    """ids cut into rows of `length`, the last part left out; at most n rows, spread over the text."""
    rows = [list(ids[start : start + length]) for start in range(0, len(ids) - length + 1, length)]
    return rows if n is None else rows[:: max(1, len(rows) // n)][:n]


@torch.no_grad()
def perplexity(model: Decoder, rows: Sequence[Sequence[int]]) -> float:
    """exp of the mean nll of every token but each row's first. Rows of equal length."""
    ids = torch.tensor(rows)
    ones = torch.ones_like(ids)
    total = 0.0
    for part in ids.split(4):
        batch = Batch(part, ones[: len(part)], ones[: len(part)])
        total += float(per_token_nll(model, batch.input_ids, batch.segment_ids, batch.completion_mask).double().sum())
    return math.exp(total / (ids.numel() - len(ids)))
