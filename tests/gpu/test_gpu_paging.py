"""optim on a GPU: pages spilled to pinned host memory give the bits of the unpaged run, and give memory back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optim import PagedAdamW
from tests.accuracy import assert_as_accurate_as

SHAPES = [(300, 129), (7,), (1000, 64), (4096,)]
PAGE_BYTES = 65536


def run(device: torch.device, make, dtype=torch.float32, steps: int = 20) -> tuple[list[torch.Tensor], object]:
    generator = torch.Generator().manual_seed(0)
    tensors = [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]
    optimizer = make(tensors)
    for _ in range(steps):
        for tensor in tensors:
            tensor.grad = torch.randn(tensor.shape, generator=generator).to(device, dtype)
        optimizer.step()
    return [tensor.detach() for tensor in tensors], optimizer


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("frames", [0, 3, 5])
def test_no_budget_changes_a_bit(device, state_bits, prefetch, frames):
    wanted, _ = run(device, lambda tensors: PagedAdamW(tensors, state_bits=state_bits))
    found, optimizer = run(
        device,
        lambda tensors: PagedAdamW(
            tensors, state_bits=state_bits, device_budget=frames * PAGE_BYTES, page_bytes=PAGE_BYTES, prefetch=prefetch
        ),
    )
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert optimizer.stats["bytes_in"] > 0


def test_32_bit_steps_are_as_accurate_as_torchs(device):
    runs = {
        "exact": run(device, torch.optim.AdamW, torch.float64)[0],
        "torch": run(device, lambda tensors: torch.optim.AdamW(tensors, fused=True))[0],
        "ours": run(device, lambda tensors: PagedAdamW(tensors, device_budget=0, page_bytes=PAGE_BYTES))[0],
    }
    exact, torchs, ours = (torch.cat([t.flatten() for t in tensors]) for tensors in runs.values())
    assert_as_accurate_as(torchs, ours, exact)


def test_work_on_another_stream_is_waited_for(device):
    wanted, _ = run(device, PagedAdamW)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        found, _ = run(device, lambda tensors: PagedAdamW(tensors, device_budget=0, page_bytes=PAGE_BYTES))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_memory_of_the_device_is_given_back(device):
    peaks = {}
    for budget in (None, 0):
        p = nn.Parameter(torch.zeros(8_000_000, device=device))
        p.grad = torch.ones_like(p)
        before = torch.cuda.memory_allocated()
        optimizer = PagedAdamW([p], device_budget=budget, page_bytes=2**20)
        optimizer.step()
        torch.cuda.synchronize()
        peaks[budget] = torch.cuda.memory_allocated() - before
        optimizer.close()
    assert peaks[None] - peaks[0] >= 0.85 * 8 * 8_000_000
