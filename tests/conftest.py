"""What every test gets: the same random numbers each time. On request: fresh memory full of NaN, small row chunks."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():  # before triton is first imported: its kernels then run on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Each test starts from the same random state, whatever ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(params=[64, 1 << 20], ids=["many chunks", "one chunk"])
def row_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """load_model reads this many elements at a time."""
    monkeypatch.setattr("models.load.CHUNK", request.param)


@pytest.fixture
def nan_filled_empty() -> Iterator[None]:
    """While the test runs, torch.empty and its kin return NaN (255 in uint8), so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all(), "torch no longer fills uninitialised memory in deterministic mode"
    yield
    torch.use_deterministic_algorithms(False)
