"""optim/transport.HostTransport as for a GPU, with streams and events that write down what is asked of them.

There is no GPU here; tests/gpu/test_gpu_paging.py does the same on one. What counts: a copy runs on the stream of its
way, after the work that the main stream was given before `used`, into pinned memory, and has ended when its call
returns.
"""

from contextlib import contextmanager

import pytest
import torch

from optim import HostTransport, PageTable
from optim.transport import frames_on

log: list[tuple] = []


class Event:
    def record(self, stream) -> None:
        log.append(("record", self, stream))


class Stream:
    def __init__(self, device=None) -> None:
        self.device = device

    def wait_event(self, event) -> None:
        log.append(("wait", self, event))

    def synchronize(self) -> None:
        log.append(("synchronize", self))


@pytest.fixture
def cuda(monkeypatch) -> HostTransport:
    log.clear()
    main, empty, copy = Stream(), torch.empty, torch.Tensor.copy_

    @contextmanager
    def stream(chosen):
        log.append(("on", chosen))
        yield

    def pinned(*shape, pin_memory=False, **options):
        log.append(("pinned", pin_memory))
        return empty(*shape, **options)

    def copied(target, source, non_blocking=False):
        log.append(("copy", non_blocking))
        return copy(target, source)

    for name, value in {"Stream": Stream, "Event": Event, "stream": stream}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    return HostTransport(torch.device("cuda"))


def test_each_way_has_a_stream_that_waits_for_the_main_one_and_is_waited_for(cuda):
    frame = torch.arange(64, dtype=torch.uint8)
    cuda.used()
    (_, event, _) = log.pop()
    cuda.write(3, frame)
    into, out = cuda.streams
    assert log == [("pinned", True), ("on", out), ("wait", out, event), ("copy", True), ("synchronize", out)]
    log.clear()
    back = torch.zeros(64, dtype=torch.uint8)
    cuda.read(3, back)
    assert log == [("on", into), ("wait", into, event), ("copy", True), ("synchronize", into)]
    assert back.equal(frame)
    log.clear()
    cuda.write(3, frame)
    assert ("pinned", True) not in log, "a page's place in the host's memory is kept"


def test_a_table_records_what_the_main_stream_did_before_it_moves_a_page(cuda, monkeypatch):
    monkeypatch.setattr(cuda, "frames", lambda n, size: frames_on(torch.device("cpu"), n, size))
    pages = PageTable([64] * 5, 64, cuda, budget=0)
    for turn in range(3):
        for page, frame in pages.walk(range(5)):
            assert frame.eq(10 * page + turn if turn else 0).all()
            frame.fill_(10 * page + turn + 1)
    pages.close()
    waited = [entry[2] for entry in log if entry[0] == "wait"]
    recorded = [entry[1] for entry in log if entry[0] == "record"]
    assert set(waited) <= set(recorded)
    for event in set(waited):
        first_wait = next(at for at, entry in enumerate(log) if entry[0] == "wait" and entry[2] is event)
        assert next(at for at, entry in enumerate(log) if entry[1:2] == (event,)) < first_wait
