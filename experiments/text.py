"""Real text that lies on every machine, in CPython itself: English, and source code.

    reference   the Python language reference, as `help()` shows it: about 450 KB of English with examples
    source      modules of the standard library

Both differ a little from version to version; rows say which version they were measured with.
"""

import math
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics  # type: ignore[import-untyped]  # of the standard library

import torch
from torch import Tensor

from models import Decoder
from trainers.logprobs import per_token_nll


def reference() -> str:
    """Every topic, in alphabetical order."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def source(modules: Sequence[str]) -> str:
    """The files of these top-level modules of the standard library, one after the other."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return "\n\n".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in modules)


def rows_of(ids: Sequence[int], length: int, n: int | None = None) -> list[list[int]]:
    """ids cut into rows of `length`, the last part left out; at most n rows, spread over the text."""
    rows = [list(ids[start : start + length]) for start in range(0, len(ids) - length + 1, length)]
    return rows if n is None else rows[:: max(1, len(rows) // n)][:n]


@torch.no_grad()
def row_losses(model: Decoder, rows: Sequence[Sequence[int]]) -> Tensor:
    """Mean nll of every row's tokens but its first, in nats: float64 (n,). Rows of equal length."""
    ids = torch.tensor(rows)
    ones = torch.ones_like(ids)
    parts = zip(ids.split(4), ones.split(4), strict=True)
    return torch.cat([per_token_nll(model, part, one, one).double().mean(1) for part, one in parts])


def perplexity(model: Decoder, rows: Sequence[Sequence[int]]) -> float:
    """exp of the mean nll of every token but each row's first."""
    return math.exp(float(row_losses(model, rows).mean()))
