"""optim: with a folder as the slow tier and a budget of a tenth, the process's peak anonymous memory really falls.

Each budget runs in a process of its own, `python tests/test_paging_memory.py BUDGET`, which prints its peak: RssAnon of
/proc/self/status, the memory that is no file's, sampled every half millisecond while it takes three steps.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STATUS = Path("/proc/self/status")
ELEMENTS, PAGE_BYTES = 12_000_000, 2**20


def anonymous_bytes() -> int:
    return next(1024 * int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("RssAnon:"))


def measure(budget: int | None) -> dict[str, int]:
    """Three steps; the peak from the first step on, and what the optimizer says is spilled."""
    import torch

    from optim import PagedAdamW

    parameter = torch.nn.Parameter(torch.zeros(ELEMENTS))
    parameter.grad = torch.ones(ELEMENTS)
    peak, done = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.0005)

    sampler = threading.Thread(target=sample)
    sampler.start()
    with tempfile.TemporaryDirectory() as folder:
        optimizer = PagedAdamW([parameter], device_budget=budget, page_bytes=PAGE_BYTES, spill=folder)
        for _ in range(3):
            optimizer.step()
            peak = max(peak, anonymous_bytes())
        done.set()
        sampler.join()
        return {"peak": peak, "spilled": optimizer.stats["spilled_bytes"]}


def in_a_process_of_its_own(budget: int | None) -> dict[str, int]:
    command = [sys.executable, __file__, json.dumps(budget)]
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True, cwd=ROOT).stdout)


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's /proc")
def test_the_peak_falls_by_what_is_spilled():
    state = 8 * ELEMENTS
    whole, tenth = in_a_process_of_its_own(None), in_a_process_of_its_own(state // 10)
    assert whole["spilled"] == 0
    assert 0.85 * state < tenth["spilled"] <= 0.9 * state + 4 * PAGE_BYTES, "three frames are passed through; rounding"
    saved = whole["peak"] - tenth["peak"]
    assert saved >= 0.85 * tenth["spilled"], f"{saved:,} of {tenth['spilled']:,} spilled bytes"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    print(json.dumps(measure(json.loads(sys.argv[1]))))
