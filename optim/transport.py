"""Between two tiers of memory: what moves a page from the fast one to the slow one and back.

    HostTransport     GPU → pinned memory of the host, on a stream for each way (CPU → a second pool: frees nothing)
    FolderTransport   CPU → a file in a folder: the memory is really freed, and the file goes when its process does
    SlowTransport     a pretended slow device with a set bandwidth and latency, for tests and for teaching

The page table (pages.py) calls `read` and `write` from several threads, never for one page or one frame at once. A
frame is a page's place in the fast tier: uint8 (page_bytes,). What it is given here may be shorter: the part of it that
is used.

The streams of HostTransport are written from CUDA's documentation and have not been run on a GPU.
"""

import errno
import mmap
import os
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class SpillError(OSError):
    """A page could not be moved between the tiers."""

    def __str__(self) -> str:
        return str(self.strerror)


class Transport(Protocol):
    """A slow tier."""

    def open(self, n_pages: int, page_bytes: int) -> None:
        """Called once, before the first page is written. Raises OSError where the slow tier cannot hold n_pages."""

    def frames(self, n_frames: int, page_bytes: int) -> Tensor:
        """Places in the fast tier: uint8 (n_frames, page_bytes), given back when the last reference to it goes."""

    def used(self) -> None:
        """What the caller has asked its device to do with frames so far comes before any later read or write."""

    def write(self, page: int, frame: Tensor) -> None:
        """Fast → slow. Returns when the frame may be overwritten. Raises OSError."""

    def read(self, page: int, frame: Tensor) -> None:
        """Slow → fast. Returns when the frame holds the page. Raises OSError."""

    def close(self) -> None:
        """Give the slow tier's memory back."""


def frames_on(device: torch.device, n_frames: int, page_bytes: int) -> Tensor:
    """uint8 (n_frames, page_bytes), each frame at a multiple of 64 bytes.

    On a CPU straight from the system: what no page has used yet takes no memory, and all of it goes back there, where
    malloc may keep what it is given. In one piece, so that the system can use its large pages.
    """
    stride = -(-page_bytes // 64) * 64
    if device.type != "cpu":
        return torch.empty(n_frames, stride, dtype=torch.uint8, device=device)[:, :page_bytes]
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, n_frames * stride, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(n_frames, stride)[:, :page_bytes]


def free_bytes(device: torch.device) -> int:
    """What the device has free now; on a CPU, what the system says it can give."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


class HostTransport:
    """Pages that are not in the fast tier lie in the memory of the host: pinned, where the fast tier is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pages = device, dict[int, Tensor]()
        self.streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else []  # in, out
        self.done: torch.cuda.Event | None = None

    def open(self, n_pages: int, page_bytes: int) -> None:
        pass

    def frames(self, n_frames: int, page_bytes: int) -> Tensor:
        return frames_on(self.device, n_frames, page_bytes)

    def used(self) -> None:
        if self.streams:
            self.done = torch.cuda.Event()
            self.done.record(torch.cuda.current_stream(self.device))

    def write(self, page: int, frame: Tensor) -> None:
        if page not in self.pages:
            self.pages[page] = torch.empty(len(frame), dtype=torch.uint8, pin_memory=bool(self.streams))
        self._copy(self.pages[page], frame, way=1)

    def read(self, page: int, frame: Tensor) -> None:
        self._copy(frame, self.pages[page], way=0)

    def _copy(self, target: Tensor, source: Tensor, way: int) -> None:
        if not self.streams:
            target.copy_(source)
            return
        stream = self.streams[way]
        with torch.cuda.stream(stream):
            if self.done is not None:
                stream.wait_event(self.done)
            target.copy_(source, non_blocking=True)
        stream.synchronize()  # of this stream alone: the device goes on with the page in use

    def close(self) -> None:
        self.pages.clear()


class FolderTransport:
    """One file, a slot a page. It has no name, so that nothing is left behind, however the process ends."""

    def __init__(self, folder: str | Path, device: torch.device) -> None:
        self.folder, self.device = Path(folder), device
        self.one_place = threading.Lock()  # for a system whose files have only one

    def open(self, n_pages: int, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115  # open as long as self is
            weakref.finalize(self, self.file.close)
            _reserve(self.file.fileno(), n_pages * page_bytes)
        except OSError as error:
            self.close()
            what = f"the spill folder {self.folder} must take {n_pages * page_bytes:,} bytes of optimizer state"
            raise OSError(error.errno, f"{what}: {os.strerror(error.errno or 0)}") from None

    def frames(self, n_frames: int, page_bytes: int) -> Tensor:
        return frames_on(self.device, n_frames, page_bytes)

    def used(self) -> None:
        pass

    def write(self, page: int, frame: Tensor) -> None:
        left, at = frame.cpu().numpy().data, page * self.page_bytes
        with self._named():
            while left:
                n_bytes = self._write_at(left, at)
                left, at = left[n_bytes:], at + n_bytes

    def read(self, page: int, frame: Tensor) -> None:
        host = frame.cpu()
        left, at = host.numpy().data, page * self.page_bytes
        with self._named():
            while left:
                n_bytes = self._read_at(left, at)
                if not n_bytes:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))  # the file ends
                left, at = left[n_bytes:], at + n_bytes
        if host is not frame:
            frame.copy_(host)

    def failure(self, number: int) -> SpillError:
        """What to raise where the file gave this errno."""
        return SpillError(number, f"a page of optimizer state in {self.folder} cannot be moved: {os.strerror(number)}")

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self.failure(error.errno or errno.EIO) from None

    def _write_at(self, data: memoryview, at: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self.file.fileno(), data, at)
        with self.one_place:
            self.file.seek(at)
            return self.file.write(data)

    def _read_at(self, data: memoryview, at: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.file.fileno(), [data], at)
        with self.one_place:
            self.file.seek(at)
            return self.file.readinto(data)

    def descriptor(self) -> int:
        """Of the file, in which page i lies at byte i · page_bytes."""
        return self.file.fileno()

    def close(self) -> None:
        if hasattr(self, "file"):
            self.file.close()


def _reserve(file: int, n_bytes: int) -> None:
    """Take the room now, where the system can: a disk that is too full is noticed before training, not in it."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, n_bytes)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise


class SlowTransport:
    """Each transfer takes latency + bytes / bandwidth seconds, and moves the bytes for real; both ways at once."""

    def __init__(self, *, bytes_per_second: float = float("inf"), latency: float = 0.0) -> None:
        self.bytes_per_second, self.latency = bytes_per_second, latency
        self.pages: dict[int, Tensor] = {}

    def open(self, n_pages: int, page_bytes: int) -> None:
        pass

    def frames(self, n_frames: int, page_bytes: int) -> Tensor:
        return frames_on(torch.device("cpu"), n_frames, page_bytes)

    def used(self) -> None:
        pass

    def write(self, page: int, frame: Tensor) -> None:
        self._take_time(len(frame))
        self.pages[page] = frame.clone()

    def read(self, page: int, frame: Tensor) -> None:
        self._take_time(len(frame))
        frame.copy_(self.pages[page])

    def _take_time(self, n_bytes: int) -> None:
        time.sleep(self.latency + n_bytes / self.bytes_per_second)

    def close(self) -> None:
        self.pages.clear()
