"""kernels/buffers: a block is used again when its tensor is gone, never before; no more is held than was used."""

import re
import sys
from pathlib import Path

import pytest
import torch

from kernels.buffers import OWN_MAPPING, SMALLEST, Buffers, empty, empty_like, fresh

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the blocks serve Linux alone")
N = SMALLEST // 4


def test_a_block_comes_back_when_its_tensor_and_all_its_views_are_gone():
    shape = (11, N)  # a size that nothing else asks for
    x = empty(shape, torch.float32)
    place, view = x.data_ptr(), x[1, 5:]
    del x
    assert empty(shape, torch.float32).data_ptr() != place
    del view
    one, two = empty(shape, torch.float32), empty(shape, torch.float32)
    assert place in (one.data_ptr(), two.data_ptr())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [1, 1000], ids=["malloc", "block"])
def test_a_tensor_is_an_ordinary_one(dtype, rows):
    x = empty((rows, 3, 257), dtype)
    assert (x.shape, x.dtype, x.device.type) == ((rows, 3, 257), dtype, "cpu")
    assert x.is_contiguous()
    assert not x._is_view()
    assert not x.requires_grad
    expected = torch.arange(x.numel()).view(x.shape).to(dtype)
    assert torch.equal(x.copy_(expected), expected)
    assert empty_like(x.transpose(0, 2)).is_contiguous()


def test_what_is_held_is_at_most_what_was_in_use_at_once():
    buffers = Buffers()
    first = [buffers.take(10 * SMALLEST) for _ in range(3)]
    assert (buffers.held, buffers.most_used) == (30 * SMALLEST, 30 * SMALLEST)
    del first
    second = [buffers.take(4 * SMALLEST) for _ in range(5)]  # another size: three blocks of 10 cannot all stay
    assert buffers.held <= buffers.most_used == 30 * SMALLEST
    assert buffers.held - buffers.free_bytes == 20 * SMALLEST
    del second
    third = [buffers.take(10 * SMALLEST) for _ in range(4)]
    assert buffers.held == buffers.most_used == 40 * SMALLEST
    del third


def test_blocks_that_live_at_once_do_not_overlap():
    kept = [empty((N + i,), torch.float32).fill_(i) for i in range(5)]
    del kept[1], kept[2]
    kept += [empty((N,), torch.float32).fill_(9) for _ in range(3)]
    assert [set(t.tolist()) for t in kept] == [{0.0}, {2.0}, {4.0}, {9.0}, {9.0}, {9.0}]


def test_a_block_much_larger_than_asked_for_is_not_taken():
    buffers = Buffers()
    buffers.take(8 * SMALLEST)
    assert len(buffers.take(4 * SMALLEST)) == 4 * SMALLEST
    assert len(buffers.take(SMALLEST)) == SMALLEST


def test_a_large_fresh_tensor_asks_for_huge_pages_and_a_small_one_does_not():
    for numel, asked in ((OWN_MAPPING // 2, True), (1000, False)):
        x = fresh((numel,), torch.float32, torch.device("cpu"))
        assert (x.shape, x.dtype) == ((numel,), torch.float32)
        assert ("hg" in flags_of_mapping(x.data_ptr() + x.nbytes // 2)) == asked


def flags_of_mapping(address: int) -> list[str]:
    """VmFlags of the mapping around `address`."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping around {address:x}")
