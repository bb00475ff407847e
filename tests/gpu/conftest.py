"""These tests need a GPU: `make gpu-test`. Without one each is skipped, and the last line of the run says how many."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask of cuBLAS


@pytest.fixture
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device("cuda")


def pytest_terminal_summary(terminalreporter) -> None:
    left_out = [r for r in terminalreporter.stats.get("skipped", []) if "tests/gpu/" in r.nodeid]
    if left_out:
        terminalreporter.write_line(f"{len(left_out)} GPU tests left out: no GPU here")
