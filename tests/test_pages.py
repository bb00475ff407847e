"""optim/pages, optim/transport: contents survive every budget; misses are Belady's; counters, overlap, failures."""

import errno
import gc
import os
import re
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from optim.pages import PageTable
from optim.transport import FolderTransport, HostTransport, SlowTransport

CPU = torch.device("cpu")
PAGE = 4096


def table(n_pages: int, frames: int, transport=None, **options) -> PageTable:
    used = [PAGE - 64 * (page % 3) for page in range(n_pages)]
    return PageTable(used, PAGE, transport or SlowTransport(), budget=frames * PAGE, **options)


def walk(pages: PageTable, order=None, write=True) -> None:
    for _ in pages.walk(order or range(len(pages.used)), write=write):
        pass


@pytest.fixture(params=["host", "folder", "slow"])
def transport(request, tmp_path):
    return {"host": HostTransport(CPU), "folder": FolderTransport(tmp_path, CPU), "slow": SlowTransport()}[
        request.param
    ]


@pytest.mark.parametrize("policy", ["even", "mru", "lru"])
@pytest.mark.parametrize("ahead", [0, 1, 2, 4])
@pytest.mark.parametrize("frames", [0, 1, 2, 3, 5, 6, 9])
def test_pages_keep_what_was_written(transport, frames, ahead, policy):
    pages = table(6, frames, transport, ahead=ahead, policy=policy)
    wanted = [0] * 6
    for turn, order in enumerate([range(6), range(6), [3, 1], range(6), [5], [4, 0, 2], range(6)]):
        for page, frame in pages.walk(order):
            assert frame[: pages.used[page]].eq(wanted[page]).all(), "zeros at first, then what was left there"
            assert pages.resident_bytes <= max(frames, 1 + min(ahead, 1)) * PAGE
            wanted[page] = 10 * turn + page + 1
            frame.fill_(wanted[page])
    for page, frame in pages.walk(range(6), write=False):
        assert frame[: pages.used[page]].eq(wanted[page]).all()
    assert pages.stats.hits + pages.stats.misses == 36
    pages.close()


def belady_misses(order: list[int], frames: int) -> int:
    """The fewest misses there can be: evict what is needed furthest in the future."""
    held: set[int] = set()
    misses = 0
    for at, page in enumerate(order):
        if page in held:
            continue
        misses += 1
        if len(held) == frames:
            soon = {later: i for i, later in reversed(list(enumerate(order[at:])))}
            held.remove(max(held, key=lambda kept: soon.get(kept, len(order))))
        held.add(page)
    return misses


@pytest.mark.parametrize("n_pages", [2, 3, 7, 12])
def test_in_a_circle_mru_misses_as_little_as_can_be_and_lru_as_much(n_pages):
    rounds = 9
    order = list(range(n_pages)) * rounds
    for frames in range(1, n_pages + 1):
        mru, lru = (table(n_pages, frames, ahead=0, policy=policy) for policy in ("mru", "lru"))
        for _ in range(rounds):
            walk(mru)
            walk(lru)
        assert mru.stats.misses == belady_misses(order, frames)
        assert lru.stats.hits == (0 if frames < n_pages else n_pages * (rounds - 1))
        assert mru.stats.hits + mru.stats.misses == len(order)


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("n_pages", [5, 12])
def test_even_hits_every_frame_that_nothing_passes_through_and_never_far_from_there(n_pages, ahead):
    """Each walk after the first: as many hits as there are frames beside the one in use and those on their way; and
    no two gaps between misses differ by more than one page."""
    for frames in range(1 + ahead, n_pages):
        even = table(n_pages, frames, ahead=ahead)
        walk(even)
        missed = []
        for _ in range(4):
            hits = even.stats.hits
            for page, _ in even.walk(range(n_pages)):
                if even.stats.hits == hits:
                    missed.append(page)
                hits = even.stats.hits
        misses = n_pages - (frames - 1 - ahead)
        assert len(missed) == 4 * misses
        gaps = [(later - page) % n_pages for page, later in pairwise(missed)]
        assert misses == 1 or max(gaps) - min(gaps) <= 1
        even.close()


@pytest.mark.parametrize("frames", [2, 3, 5, 8, 9, 10])
def test_the_table_of_the_documentation(frames):
    tables = {policy: table(10, frames, policy=policy) for policy in ("lru", "mru", "even")}
    for pages in tables.values():
        for _ in range(10):
            walk(pages)
        pages.close()
    cells = [frames, *(pages.stats.hits for pages in tables.values())]
    cells += [tables["even"].stats.page_ins, tables["even"].stats.page_outs]
    page = (Path(__file__).parent.parent / "docs" / "paging.md").read_text(encoding="utf-8")
    assert f"| {' | '.join(map(str, cells))} |" in page.splitlines()


class Recorded(PageTable):
    """Writes down what is used, and what begins to be brought."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.log: list[tuple[str, int]] = []

    def _use(self, page):
        self.log.append(("use", page))
        return super()._use(page)

    def _bring(self, page, *arguments, **options):
        brought = super()._bring(page, *arguments, **options)
        if brought:
            self.log.append(("bring", page))
        return brought


def waiting(log: list[tuple[str, int]], work: float, transport: float) -> float:
    """What one lane of transport keeps the work waiting, by a clock of our own: a use works after it has waited."""
    now = lane = waited = 0.0
    ready: dict[int, float] = {}
    at_work = False
    for what, page in log:
        if what == "use":
            now += work * at_work
            wait = max(0.0, ready.pop(page, 0.0) - now)
            now, waited, at_work = now + wait, waited + wait, True
        else:
            lane = ready[page] = max(lane, now) + transport
    return waited


@pytest.mark.parametrize(("n_pages", "frames", "lru", "mru"), [(12, 8, 24, 4), (16, 12, 32, 4), (40, 30, 80, 16)])
def test_misses_apart_cost_no_waiting_where_misses_in_a_row_do(n_pages, frames, lru, mru):
    """Work on a page: 4, transport out and in: 6. By the end of the third walk each does the same in every walk."""
    waits, misses = {}, {}
    for policy in ("lru", "mru", "even"):
        pages = Recorded([PAGE] * n_pages, PAGE, SlowTransport(), budget=frames * PAGE, policy=policy)
        lengths = []
        for _ in range(9):
            walk(pages)
            lengths.append(len(pages.log))
        pages.close()
        waits[policy] = (waiting(pages.log, 4, 6) - waiting(pages.log[: lengths[2]], 4, 6)) / 6
        misses[policy] = pages.stats.misses
    assert misses["mru"] <= misses["even"] <= misses["lru"]
    assert waits == {"lru": lru, "mru": mru, "even": 0}


def test_all_resident_moves_nothing_and_never_opens_the_slow_tier():
    class Never(SlowTransport):
        def open(self, n_pages, page_bytes):
            raise AssertionError

    pages = table(5, 5, Never())
    walk(pages)
    walk(pages)
    assert (pages.stats.misses, pages.stats.hits) == (5, 5), "the first uses, then nothing"
    assert pages.stats.page_ins == pages.stats.page_outs == pages.stats.bytes_in == pages.stats.bytes_out == 0


def test_counters_of_two_frames_and_four_pages():
    """By hand. Used bytes of a page: 4096, 4032, 3968, 4096. `+` brings, `-` writes back.

    walk 1: +0 +1 | -0 +2 | -1 +3 | -2 +0     (the end of a walk brings the first page of the next)
    walk 2: 0 | -3 +1 | -0 +2 | -1 +3 | -2 +0
    """
    pages = table(4, 0)
    walk(pages)
    walk(pages)
    walk(pages, [0])  # only to wait for the page on its way
    assert (pages.stats.hits, pages.stats.misses) == (0, 9)
    assert (pages.stats.page_outs, pages.stats.page_ins) == (7, 5)
    assert pages.stats.bytes_out == 4096 + 4032 + 3968 + 4096 + 4096 + 4032 + 3968
    assert pages.stats.bytes_in == 4096 + 4032 + 3968 + 4096 + 4096
    assert pages.resident_bytes == 2 * PAGE
    assert pages.spilled_bytes == 4032 + 3968


def test_a_page_that_was_only_read_is_not_written_back():
    pages = table(4, 2)
    walk(pages)
    walk(pages, write=False)
    outs = pages.stats.page_outs
    walk(pages, write=False)
    walk(pages, write=False)
    assert pages.stats.page_outs == outs <= 4
    assert pages.stats.page_ins >= 8


@pytest.mark.parametrize("frames", [2, 4])
def test_the_next_pages_are_brought_while_this_one_is_worked_on(frames):
    """Work on a page ends only when those after it, as many as there are frames for, have been read."""
    read: list[int] = []
    came = threading.Condition()

    class Telling(SlowTransport):
        def read(self, page, frame):
            super().read(page, frame)
            with came:
                read.append(page)
                came.notify()

    pages = table(8, frames, Telling())
    walk(pages)
    walk(pages)
    for at, _ in pages.walk(range(8)):
        missing = [page % 8 for page in range(at + 1, at + 8) if page % 8 not in pages.staying][: pages.ahead]
        with came:
            assert came.wait_for(lambda: missing == read[-len(missing) :], timeout=60)  # noqa: B023
    pages.close()


def test_a_slow_device_takes_latency_and_bytes_over_bandwidth():
    slow = SlowTransport(bytes_per_second=PAGE / 0.004, latency=0.002)
    (frame,) = slow.frames(1, PAGE)
    start = time.perf_counter()
    slow.write(0, frame)
    slow.read(0, frame)
    assert time.perf_counter() - start >= 2 * 0.006


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("frames", [0, 3, 4])
@pytest.mark.parametrize("fails", ["read", "write"])
def test_a_failing_slow_tier_is_an_error_and_no_page_is_lost(fails, frames, ahead):
    class Failing(SlowTransport):
        broken = False

        def read(self, page, frame):
            if self.broken and fails == "read":
                raise OSError(errno.EIO, "the disk is gone")
            super().read(page, frame)

        def write(self, page, frame):
            if self.broken and fails == "write":
                raise OSError(errno.EIO, "the disk is gone")
            super().write(page, frame)

    slow = Failing()
    pages = table(5, frames, slow, ahead=ahead)
    for page, frame in pages.walk(range(5)):
        frame.fill_(page + 1)
    slow.broken = True
    with pytest.raises(OSError, match="the disk is gone"):
        walk(pages)
    slow.broken = False
    for page, frame in pages.walk(range(5)):
        assert frame[: pages.used[page]].eq(page + 1).all()


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(re.search(r"^Anonymous:\s+(\d+) kB", text, re.MULTILINE).group(1))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
def test_memory_is_really_freed(tmp_path):
    page, n_pages = 2**20, 64

    def measure(frames: int) -> tuple[int, int]:
        gc.collect()
        before = anonymous_bytes()
        pages = PageTable([page] * n_pages, page, FolderTransport(tmp_path, CPU), budget=frames * page)
        for _, frame in pages.walk(range(n_pages)):
            frame.fill_(1)
        del frame
        while_open = anonymous_bytes() - before
        pages.close()
        return while_open, anonymous_bytes() - before

    whole, after_whole = measure(64)
    tenth, after_tenth = measure(6)
    assert whole > 63 * page, "some kB that are not the pages' may go back meanwhile"
    assert whole - tenth >= 0.95 * 58 * page
    assert max(after_whole, after_tenth) < 2 * page
    assert list(tmp_path.iterdir()) == [], "the file has no name"


def test_a_folder_that_cannot_take_the_pages_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    message = r"the spill folder .*file must take 20,480 bytes of optimizer state: "
    with pytest.raises(OSError, match=message + "(File exists|Not a directory)"):
        table(5, 0, FolderTransport(tmp_path / "file", CPU))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="must take 20,480 bytes of optimizer state: No space left on device"):
        table(5, 0, FolderTransport(tmp_path, CPU))


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="policy must be one of even, mru, lru, got 'fifo'"):
        table(3, 2, policy="fifo")
    with pytest.raises(ValueError, match="must not be negative, got -4096"):
        table(3, -1)
