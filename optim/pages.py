"""A page table: more pages than fast memory has frames for. It knows nothing of what the pages hold.

    fast tier   frame 0   frame 1   frame 2        a budget of them
                   ↑ page-in      ↓ page-out       transport.py; a thread, while the page in use is worked on
    slow tier   page 0   page 1   page 2   page 3   page 4 …

An optimizer walks its pages in a circle, 0 … N-1, 0 … N-1. When a frame is needed, which page has to go?

    LRU   the least recently used. In a circle that is the very page that is needed soonest: with F < N frames it has
          gone by the time that it is wanted, and nothing is ever a hit. The worst there is.
    MRU   the most recently used, that is, the one whose turn comes last. In a circle this is what Belady's rule
          (evict what is needed furthest in the future) says, so no rule has fewer misses.

While a page is in use the next one is brought: the page before it leaves its frame and the next one takes it, so two
frames are enough to overlap work and transport, and are the least that prefetching needs. A page is written back only
if it was written to, and costs no read before it was ever written back: it is zeros.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from .transport import Transport

POLICIES = ("mru", "lru")


@dataclass
class PageStats:
    """What has happened so far. Every number but the last is exact: the same on every machine and in every run."""

    hits: int = 0
    """Uses of a page that was in its frame, before anybody asked for it."""
    misses: int = 0
    """Uses of a page that had to be brought, in time or not."""
    page_ins: int = 0
    """Misses that were read from the slow tier; the others were first uses."""
    page_outs: int = 0
    """Pages written to the slow tier."""
    bytes_in: int = 0
    bytes_out: int = 0
    wait_seconds: float = 0.0
    """Spent waiting for a page that was not there in time."""


@dataclass
class _Arrival:
    """A page on its way into `frame`, which `victim` leaves."""

    page: int
    frame: Tensor
    victim: int | None
    saves_victim: bool
    victim_saved: bool = False
    future: "Future[None] | None" = None


class PageTable:
    """`used[i]` bytes of page i matter; a frame holds page_bytes. `budget` is in bytes, and never less than one page
    and, with prefetch, the next one."""

    def __init__(
        self,
        used: Sequence[int],
        page_bytes: int,
        transport: Transport,
        *,
        budget: int,
        prefetch: bool = True,
        policy: str = "mru",
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
        if budget < 0:
            raise ValueError(f"a budget of fast memory must not be negative, got {budget}")
        self.used, self.page_bytes, self.transport, self.policy = list(used), page_bytes, transport, policy
        self.prefetch = prefetch
        least = 2 if prefetch else 1
        self.n_frames = min(len(self.used), max(least, budget // page_bytes))
        self.stats = PageStats()
        frames = transport.frames(self.n_frames, page_bytes) if used else ()
        self.free: list[Tensor] = list(reversed(tuple(frames)))
        self.resident: dict[int, Tensor] = {}  # page → frame, the most recently used last
        self.dirty: set[int] = set()
        self.saved: set[int] = set()  # pages that the slow tier holds, old or new
        self._arrival: _Arrival | None = None
        self._thread: ThreadPoolExecutor | None = None
        if self.n_frames < len(self.used):
            transport.open(len(self.used), page_bytes)

    @property
    def resident_bytes(self) -> int:
        """Of fast memory in use, by whole frames."""
        return self.page_bytes * (len(self.resident) + (self._arrival is not None))

    @property
    def spilled_bytes(self) -> int:
        """Of pages that are in the slow tier only."""
        return sum(self.used[page] for page in self.saved - set(self.resident))

    def counters(self) -> dict[str, Any]:
        """All of `stats`, and where the bytes are now."""
        return asdict(self.stats) | {"resident_bytes": self.resident_bytes, "spilled_bytes": self.spilled_bytes}

    def walk(self, pages: Sequence[int], *, write: bool = True) -> Iterator[tuple[int, Tensor]]:
        """Use the pages in this order: (page, frame uint8 (page_bytes,)) each; the frame is good until the next one.

        write=False promises to leave them as they are. Raises OSError where the slow tier fails: no page is lost.
        """
        for at, page in enumerate(pages):
            frame = self._use(page)
            if write:
                self.dirty.add(page)
            if self.prefetch:
                self._bring(pages[(at + 1) % len(pages)], in_use=page)  # the last brings the first of the next walk
            yield page, frame
            self.transport.used()

    def close(self) -> None:
        """Give all memory back, in both tiers. What the pages held is gone."""
        if self._arrival is not None and self._arrival.future is not None:
            self._arrival.future.exception()  # waits
        if self._thread is not None:
            self._thread.shutdown()
        self._arrival = self._thread = None
        self.resident.clear()
        self.free.clear()
        self.transport.close()

    def _use(self, page: int) -> Tensor:
        """The frame of a page, now."""
        brought = self._arrival is not None and self._arrival.page == page
        self._settle()
        if not brought and page in self.resident:
            self.stats.hits += 1
        else:
            self.stats.misses += 1
        if page not in self.resident:
            self._bring(page)
            self._settle()
        frame = self.resident.pop(page)
        self.resident[page] = frame  # most recently used
        return frame

    def _bring(self, page: int, in_use: int | None = None) -> None:
        """Start to bring a page, unless it is there. With a page in use, in the thread; else at once."""
        if page in self.resident:
            return
        victim = None
        if self.free:
            frame = self.free.pop()
        else:
            by_age = [p for p in self.resident if p != in_use]
            victim = by_age[-1] if self.policy == "mru" else by_age[0]
            frame = self.resident.pop(victim)
        self._arrival = _Arrival(page, frame, victim, saves_victim=victim in self.dirty)
        self.transport.used()
        if in_use is None:
            self._arrival.future = self._run_now(self._arrival)
        else:
            self._thread = self._thread or ThreadPoolExecutor(1, "pages")
            self._arrival.future = self._thread.submit(self._move, self._arrival)

    def _run_now(self, arrival: _Arrival) -> "Future[None]":
        """As the thread would, but at once: all of it is waiting."""
        future: Future[None] = Future()
        start = time.perf_counter()
        try:
            self._move(arrival)
            future.set_result(None)
        except OSError as error:
            future.set_exception(error)
        self.stats.wait_seconds += time.perf_counter() - start
        return future

    def _move(self, arrival: _Arrival) -> None:
        """Victim out, page in. Touches nothing of the table: it may run beside it."""
        if arrival.saves_victim and arrival.victim is not None:
            self.transport.write(arrival.victim, arrival.frame[: self.used[arrival.victim]])
            arrival.victim_saved = True
        frame = arrival.frame[: self.used[arrival.page]]
        if arrival.page in self.saved:
            self.transport.read(arrival.page, frame)
        else:
            frame.zero_()

    def _settle(self) -> None:
        """Wait for the page on its way, and write down what happened."""
        arrival, self._arrival = self._arrival, None
        if arrival is None or arrival.future is None:
            return
        start = time.perf_counter()
        error = arrival.future.exception()
        self.stats.wait_seconds += time.perf_counter() - start
        if arrival.victim is not None and arrival.victim_saved:
            self.stats.page_outs += 1
            self.stats.bytes_out += self.used[arrival.victim]
            self.dirty.discard(arrival.victim)
            self.saved.add(arrival.victim)
        if error is not None:
            if arrival.victim is not None and arrival.saves_victim and not arrival.victim_saved:
                self.resident[arrival.victim] = arrival.frame  # it could not leave
            else:
                self.free.append(arrival.frame)
            raise error
        self.resident[arrival.page] = arrival.frame
        if arrival.page in self.saved:
            self.stats.page_ins += 1
            self.stats.bytes_in += self.used[arrival.page]
