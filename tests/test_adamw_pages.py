"""kernels/adamw_pages, and PagedAdamW by it: all pages in one C call give the bits of a step without pages."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from kernels import use_backend
from kernels.cpu import library
from optim import FolderTransport, PagedAdamW, SlowTransport

CPU = torch.device("cpu")
USABLE = library.usable_isas(library.build()) if library.why_missing() is None else ()
SHAPES = [(90, 70), (3,), (5000,), (1,), (40, 257), (0, 4)]

pytestmark = pytest.mark.skipif(not USABLE, reason="needs a C compiler")


@pytest.fixture(autouse=True, params=sorted({*USABLE[:1], *USABLE[-1:]}))
def isa(request, monkeypatch) -> Iterator[str]:
    monkeypatch.setenv("QLORA_CPU_ISA", request.param)
    with use_backend("auto"):
        yield request.param


def parameters(dtype=torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def train(optimizer: PagedAdamW, tensors: list[nn.Parameter], steps: range) -> None:
    """Parameter 2 has no gradient in every third step, parameter 3 never; that of parameter 0 is not contiguous."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for i, tensor in enumerate(tensors):
            gradient = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            gradient = gradient.T.contiguous().T if i == 0 else gradient
            tensor.grad = None if i == 3 or (i == 2 and step % 3 == 0) else gradient
        optimizer.step()


def run(dtype=torch.float32, steps: int = 9, **options) -> tuple[PagedAdamW, list[nn.Parameter]]:
    tensors = parameters(dtype)
    groups = [{"params": tensors[:2], "lr": 3e-3}, {"params": tensors[2:], "weight_decay": 0.1}]
    optimizer = PagedAdamW(groups, **options)
    train(optimizer, tensors, range(steps))
    return optimizer, tensors


def state_of(optimizer: PagedAdamW) -> dict[tuple[int, str], torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {(i, name): value for i, fields in state.items() for name, value in fields.items()}


@pytest.mark.parametrize(("bits", "dtype"), [(32, torch.float32), (32, torch.bfloat16), (8, torch.float32)])
@pytest.mark.parametrize(
    ("page_bytes", "budget", "threads"), [(4096, 0, 1), (9999, 20_000, 2), (4096, 60_000, 5), (9999, 0, 3)]
)
def test_the_bits_of_a_step_without_pages(tmp_path, bits, dtype, page_bytes, budget, threads):
    whole, wanted = run(dtype, state_bits=bits)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        paged, found = run(
            dtype,
            state_bits=bits,
            page_bytes=page_bytes,
            device_budget=budget,
            transport=FolderTransport(tmp_path, CPU),
        )
    finally:
        torch.set_num_threads(before)
    assert paged.table is not None
    assert paged.table._threads is None, "no page was walked to"
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    exact, ours = state_of(whole), state_of(paged)
    assert exact.keys() == ours.keys()
    assert all(torch.equal(ours[key], exact[key]) for key in exact)
    paged.close()


def test_counters_by_hand(tmp_path):
    """1792 elements: seven pages of 256, 2048 bytes each. Five frames: two pages stay, five pass through three.

    Three steps: the two are misses once, then hits; the five are misses each time, read from the second step on.
    """
    (p,) = tensors = [nn.Parameter(torch.randn(7 * 256))]
    optimizer = PagedAdamW(
        tensors, page_bytes=2048 + 128, device_budget=5 * (2048 + 128), transport=FolderTransport(tmp_path, CPU)
    )
    for _ in range(3):
        p.grad = torch.randn(7 * 256)
        optimizer.step()
    stats = optimizer.stats
    assert stats.pop("wait_seconds") > 0
    assert stats == {
        "hits": 4,
        "misses": 17,
        "page_ins": 10,
        "page_outs": 15,
        "bytes_in": 10 * 2048,
        "bytes_out": 15 * 2048,
        "resident_bytes": 5 * (2048 + 128),
        "spilled_bytes": 5 * 2048,
    }


class Broken(FolderTransport):
    """Its file can be opened anew for reading alone, or for writing alone."""

    flags: int | None = None

    def descriptor(self) -> int | None:
        whole = super().descriptor()
        return whole if self.flags is None else os.open(f"/proc/self/fd/{whole}", self.flags)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux's /proc")
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY], ids=["writing fails", "reading fails"])
@pytest.mark.parametrize("budget", [0, 20_000, 60_000])
def test_a_failing_file_is_an_error_and_no_page_is_lost(tmp_path, flags, budget):
    """Every element's state is that before the step, or that after it."""
    transport = Broken(tmp_path, CPU)
    paged, tensors = run(page_bytes=4096, device_budget=budget, transport=transport)
    before, after = state_of(paged), state_of(run(steps=10)[0])
    transport.flags = flags
    with pytest.raises(
        OSError, match=rf"a page of optimizer state in {tmp_path} cannot be moved: {os.strerror(errno.EBADF)}"
    ):
        train(paged, tensors, range(9, 10))
    transport.flags = None
    found = state_of(paged)
    for key in before:
        if key[1] != "step":
            assert ((found[key] == before[key]) | (found[key] == after[key])).all(), key
    train(paged, tensors, range(10, 12))
    assert paged.stats["resident_bytes"] <= max(2 * 4096, budget)


def test_a_step_through_another_slow_tier_walks_and_gives_the_same_bits(tmp_path):
    folder, found = run(page_bytes=4096, device_budget=0, transport=FolderTransport(tmp_path, CPU))
    slow, wanted = run(page_bytes=4096, device_budget=0, transport=SlowTransport())
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert folder.table is not None
    assert slow.table is not None
    assert (folder.table._threads, slow.table._threads is None) == (None, False)
