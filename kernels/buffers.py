"""buffers: memory for activations, kept and used again.

A training step asks for the same sizes again and again. malloc serves them badly: mapped afresh, a page costs about
0.25 µs a KB at its first touch, which is as much as the work on it; from the heap, a block that is to be aligned needs
more room than such a block leaves when it is freed, and a third of the heap was holes (glibc 2.36; docs/log.md). So a
block here has one tensor over it at a time, and comes back when that tensor and all views of it are gone.

What is held never exceeds the most that was in use at once: where a new block would, free ones are given back first.

What is to be kept is not for these blocks. `fresh` gives it memory of its own, in huge pages, of which the first touch
costs a fifth.

Left out: other systems than Linux and other devices than the CPU, whose own allocator serves.
"""

import ctypes
import mmap
import sys
import threading
import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 1 << 19  # bytes: malloc serves what is smaller
SLACK = 1 / 8  # how much larger than asked for a block may be
OWN_MAPPING = 1 << 25  # bytes: a larger tensor is glibc's own mapping, and what it is advised ends with it


class Buffers:
    """Blocks of memory. `held` bytes are mapped, of which at most `most_used` were ever in use at once."""

    def __init__(self) -> None:
        self.held = self.free_bytes = self.most_used = 0
        self._free: dict[int, list[mmap.mmap]] = {}  # by length; lengths that have long been free come first
        self._returned: deque[mmap.mmap] = deque()  # a tensor may die anywhere, even inside take
        self._leases: dict[int, tuple[weakref.ref[memoryview], mmap.mmap]] = {}
        self._lock = threading.Lock()

    def take(self, size: int) -> memoryview:
        """At least `size` bytes, unspecified ones; they are free again when the memoryview is gone."""
        with self._lock:
            while self._returned:
                block = self._returned.popleft()
                self._free.setdefault(len(block), []).append(block)
                self.free_bytes += len(block)
            block = self._fitting(size) or self._fresh(size)
            self.most_used = max(self.most_used, self.held - self.free_bytes)
        lease = memoryview(block)
        reference = weakref.ref(lease, self._give_back)
        self._leases[id(reference)] = reference, block
        return lease

    def _give_back(self, reference: "weakref.ref[memoryview]") -> None:
        self._returned.append(self._leases.pop(id(reference))[1])

    def _fitting(self, size: int) -> mmap.mmap | None:
        """The smallest free block that is large enough and not much too large."""
        if size not in self._free:
            size = min((n for n in self._free if size <= n <= size * (1 + SLACK)), default=0)
        return self._remove(size) if size else None

    def _fresh(self, size: int) -> mmap.mmap:
        used = self.held - self.free_bytes
        while self._free and self.held + size > max(self.most_used, used + size):
            self.held -= len(self._remove(next(iter(self._free))))
        self.held += size
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def _remove(self, size: int) -> mmap.mmap:
        blocks = self._free[size]
        block = blocks.pop()
        if not blocks:
            del self._free[size]
        self.free_bytes -= size
        return block


_buffers = Buffers()


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """torch.empty(shape, dtype=dtype, device=device), from the blocks where they serve."""
    numel = 1
    for n in shape:
        numel *= n
    size = numel * dtype.itemsize
    served = size >= SMALLEST and sys.platform == "linux" and torch.device(device).type == "cpu"
    if not served or torch.compiler.is_compiling():
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    return torch.frombuffer(_buffers.take(size), dtype=dtype, count=numel).resize_(tuple(shape))


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty(shape, dtype=dtype, device=device), in huge pages where a CPU tensor is large and Linux has them."""
    x = torch.empty(tuple(shape), dtype=dtype, device=device)
    served = device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE") and not torch.compiler.is_compiling()
    if served and x.nbytes > OWN_MAPPING:
        start = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = x.data_ptr() + x.nbytes - start
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return x


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """empty of x's shape and device; contiguous."""
    return empty(x.shape, dtype or x.dtype, x.device)
