"""A page table: more pages than fast memory has frames for. It knows nothing of what the pages hold.

    fast tier   frame 0   frame 1   frame 2        a budget of them
                   ↑ page-in      ↓ page-out       transport.py; in threads, while a page is worked on
    slow tier   page 0   page 1   page 2   page 3   page 4 …

An optimizer walks its pages in a circle, 0 … N-1, 0 … N-1. When a frame is needed, which page has to go?

    LRU    the least recently used. In a circle that is the very page that is needed soonest: with F < N frames it has
           gone by the time that it is wanted, and nothing is ever a hit. The worst there is.
    MRU    the most recently used, that is, the one whose turn comes last. In a circle this is what Belady's rule
           (evict what is needed furthest in the future) says, so no rule has fewer misses. But they come in a row:
           first the pages that stayed, with nothing to bring, then those that did not, with nothing to hide them.
    EVEN   F - 3 pages stay for good, every N / (F - 3)th; the others pass through the three frames left: one in use,
           one being filled, one being emptied. A page or two more is brought than by Belady's rule, but each has the
           time of all the pages since the one before it. What PagedAdamW takes.

In a `walk`, while a page is in use, the next `ahead` of those missing are brought; `visits` are for one who brings them
himself. Two frames are enough to overlap work and
transport, and are the least that this needs. A page is written back only if it was written to, and costs no read
before it was ever written back: it is zeros.
"""

import contextlib
import os
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from kernels.adamw_pages import Comes, Stage, Visit

from .transport import Transport

POLICIES = ("even", "mru", "lru")
AHEAD = 2
THREADS = max(1, min(AHEAD, (os.cpu_count() or 1) - 1))  # that move pages: one processor is left to work on them


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
    reads: bool
    """Else the page is new: zeros."""
    victim_saved: bool = False
    future: "Future[None]" = field(default_factory=Future)


class PageTable:
    """`used[i]` bytes of page i matter; a frame holds page_bytes. `budget` is in bytes, and never less than one page
    and, with ahead > 0, the next one. ahead=0 brings a page when it is used."""

    def __init__(
        self,
        used: Sequence[int],
        page_bytes: int,
        transport: Transport,
        *,
        budget: int,
        ahead: int = AHEAD,
        policy: str = "even",
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
        if budget < 0:
            raise ValueError(f"a budget of fast memory must not be negative, got {budget}")
        self.used, self.page_bytes, self.transport, self.policy = list(used), page_bytes, transport, policy
        self.n_frames = min(len(self.used), max(1 + min(ahead, 1), budget // page_bytes))
        self.ahead = min(ahead, self.n_frames - 1)
        n_staying = self.n_frames if self.n_frames == len(self.used) else self.n_frames - 1 - self.ahead
        self.staying = _spread(n_staying, len(self.used)) if policy == "even" else set[int]()
        self.stats = PageStats()
        frames = transport.frames(self.n_frames, page_bytes) if used else ()
        self.free: list[Tensor] = list(reversed(tuple(frames)))
        self.resident: dict[int, Tensor] = {}  # page → frame, the most recently used last
        self.dirty: set[int] = set()
        self.saved: set[int] = set()  # pages that the slow tier holds, old or new
        self._arrivals: dict[int, _Arrival] = {}  # by page, in the order of their use
        self._threads: ThreadPoolExecutor | None = None
        self._passing = False
        if self.n_frames < len(self.used):
            transport.open(len(self.used), page_bytes)

    @property
    def resident_bytes(self) -> int:
        """Of fast memory in use, by whole frames; those that pages pass through are."""
        passing = len(self.free) if self._passing else 0
        return self.page_bytes * (len(self.resident) + len(self._arrivals) + passing)

    @property
    def spilled_bytes(self) -> int:
        """Of pages that are in the slow tier only."""
        return sum(self.used[page] for page in self.saved - set(self.resident))

    @property
    def movers(self) -> int:
        """Threads that move pages while others work on them."""
        return THREADS if self.ahead and self.n_frames < len(self.used) else 0

    def counters(self) -> dict[str, Any]:
        """All of `stats`, and where the bytes are now."""
        return asdict(self.stats) | {"resident_bytes": self.resident_bytes, "spilled_bytes": self.spilled_bytes}

    def walk(self, pages: Sequence[int], *, write: bool = True) -> Iterator[tuple[int, Tensor]]:
        """Use the pages in this order: (page, frame uint8 (page_bytes,)) each; the frame is good until the next one.

        write=False promises to leave them as they are. Raises OSError where the slow tier fails: no page is lost.
        """
        if [page for page in pages if page not in self.resident][: len(self._arrivals)] != list(self._arrivals):
            self._settle_all()  # the last walk brought what this one does not begin with
        for at, page in enumerate(pages):
            frame = self._use(page)
            if write:
                self.dirty.add(page)
            self._look_ahead(pages, at)
            yield page, frame

    def visits(self, pages: Sequence[int]) -> list[Visit]:
        """Instead of a walk, for one who moves the pages himself: what to do with each, in any order or at once.

        Those that stay have a frame; the others pass through `free`, and are taken away at the end of their visit. Then
        `visited` has to be called. Raises OSError.
        """
        self._passing = True
        self._settle_all()
        for page in [page for page in self.resident if page not in self.staying]:
            self._take_away(page)
        return [self._visit(page) for page in pages]

    def visited(self, visits: Sequence[Visit]) -> None:
        """Write down what happened. No page is lost: one that could not be taken away keeps the frame that it is in,
        and one that was not begun, or could not be read, is where it was.
        """
        lanes, passing = max(1, len({visit.passed for visit in visits} - {None})), tuple(self.free)
        for visit in visits:
            frame = passing[visit.passed] if visit.passed is not None else visit.frame
            came = visit.comes is Comes.READ and visit.stage >= Stage.WORKED
            self.stats.hits += visit.stage > Stage.NOT_BEGUN and visit.comes is Comes.THERE
            self.stats.misses += visit.stage > Stage.NOT_BEGUN and visit.comes is not Comes.THERE
            self.stats.page_ins += came
            self.stats.bytes_in += visit.used * came
            self.stats.wait_seconds += visit.seconds / lanes
            if visit.stage is Stage.GONE:
                self._gone(visit.page)
            elif visit.stage is Stage.WORKED and frame is not None:
                self.resident[visit.page] = frame
                self.dirty.add(visit.page)
                self.free = [other for other in self.free if other is not frame]
            elif visit.frame is not None and visit.comes is not Comes.THERE:
                self.free.append(visit.frame)

    def _visit(self, page: int) -> Visit:
        frame, comes = self.resident.get(page), Comes.READ if page in self.saved else Comes.NEW
        if frame is not None:
            comes = Comes.THERE
        elif page in self.staying:
            frame = self.free.pop()
        return Visit(page, self.used[page], page * self.page_bytes, frame, comes, goes=page not in self.staying)

    def _take_away(self, page: int) -> None:
        if page in self.dirty:
            self.transport.write(page, self.resident[page][: self.used[page]])
            self._gone(page)
        self.free.append(self.resident.pop(page))

    def _gone(self, page: int) -> None:
        """A page was written back."""
        self.stats.page_outs += 1
        self.stats.bytes_out += self.used[page]
        self.dirty.discard(page)
        self.saved.add(page)

    def close(self) -> None:
        """Give all memory back, in both tiers. What the pages held is gone."""
        for arrival in self._arrivals.values():
            arrival.future.exception()  # waits
        if self._threads is not None:
            self._threads.shutdown()
        self._arrivals.clear()
        self.resident.clear()
        self.free.clear()
        self.transport.close()

    def _use(self, page: int) -> Tensor:
        """The frame of a page, now."""
        if page in self.resident:
            self.stats.hits += 1
        else:
            self.stats.misses += 1
            start = time.perf_counter()
            if page not in self._arrivals:
                self._settle_all()
                self._bring(page, (), at_once=True)
            self._settle(page)
            self.stats.wait_seconds += time.perf_counter() - start
        frame = self.resident.pop(page)
        self.resident[page] = frame  # most recently used
        return frame

    def _look_ahead(self, pages: Sequence[int], at: int) -> None:
        """Start to bring the missing ones of the pages that come next; after the last come those of the next walk."""
        if self.n_frames == len(self.used):
            return
        needed_before = {pages[at]}
        for later in range(at + 1, at + len(pages)):
            if len(self._arrivals) >= self.ahead:
                return
            page = pages[later % len(pages)]
            if page not in self.resident and page not in self._arrivals and not self._bring(page, needed_before):
                return
            needed_before.add(page)

    def _bring(self, page: int, needed_before: Collection[int], *, at_once: bool = False) -> bool:
        """Start to bring a page, in the threads or at once; False when no page may leave its frame for it."""
        victim = None if self.free else self._victim(needed_before)
        if not self.free and victim is None:
            return False
        frame = self.free.pop() if victim is None else self.resident.pop(victim)
        leaving = next((other for other in self._arrivals.values() if other.victim == page), None)
        reads = page in self.saved or leaving is not None
        arrival = self._arrivals[page] = _Arrival(page, frame, victim, victim in self.dirty, reads)
        self.transport.used()
        if at_once:
            self._move(arrival, leaving)
        else:
            self._threads = self._threads or ThreadPoolExecutor(THREADS, "pages")
            self._threads.submit(self._move, arrival, leaving)
        return True

    def _victim(self, needed_before: Collection[int]) -> int | None:
        may_go = [page for page in self.resident if page not in needed_before and page not in self.staying]
        return (may_go[-1] if self.policy == "mru" else may_go[0]) if may_go else None

    def _move(self, arrival: _Arrival, leaving: _Arrival | None) -> None:
        """Victim out, page in. It may run in a thread: of the table it reads what does not change meanwhile.

        leaving: the arrival for which this page is just being written back.
        """
        try:
            if arrival.saves_victim and arrival.victim is not None:
                self.transport.write(arrival.victim, arrival.frame[: self.used[arrival.victim]])
                arrival.victim_saved = True
            if leaving is not None:
                leaving.future.result()
            if arrival.reads:
                self.transport.read(arrival.page, arrival.frame[: self.used[arrival.page]])
            arrival.future.set_result(None)
        except BaseException as error:
            arrival.future.set_exception(error)

    def _settle(self, page: int) -> None:
        """Wait for a page on its way, and write down what happened. After an error, for all, and raise it."""
        error = self._arrived(self._arrivals.pop(page))
        if error is not None:
            with contextlib.suppress(OSError):  # as the first one most likely
                self._settle_all()
            raise error

    def _settle_all(self) -> None:
        while self._arrivals:
            self._settle(next(iter(self._arrivals)))

    def _arrived(self, arrival: _Arrival) -> BaseException | None:
        """Returns why it did not; then the victim is in its frame still, or the frame is free."""
        error, page, victim = arrival.future.exception(), arrival.page, arrival.victim
        if victim is not None and arrival.victim_saved:
            self._gone(victim)
        if victim is not None and arrival.saves_victim and not arrival.victim_saved:
            self.resident[victim] = arrival.frame
        elif error is not None or page in self.resident:  # it could not leave, so there was nothing to bring
            self.free.append(arrival.frame)
        else:
            self.resident[page] = arrival.frame
            if not arrival.reads:
                arrival.frame[: self.used[page]].zero_()
            self.stats.page_ins += arrival.reads
            self.stats.bytes_in += self.used[page] * arrival.reads
        return error


def _spread(n_staying: int, n_pages: int) -> set[int]:
    """So many of the pages, as evenly over the circle as can be."""
    return {page for page in range(n_pages) if (page + 1) * n_staying // n_pages > page * n_staying // n_pages}
