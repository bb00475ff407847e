"""adamw_pages: the optimizer's step on pages of a file, as backend "cpu": adamw_pages.h."""

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_int, c_int64, c_void_p

from torch import Tensor

from ..adamw_pages import PageSpan, Stage, Visit
from ..dispatch import register
from .adamw import Step, state_maps, step_numbers
from .library import DTYPES, load


class Span(ctypes.Structure):
    """adamw_pages.h: page_span."""

    _fields_ = (
        *((name, c_void_p) for name in ("p", "g")),
        ("n", c_int64),
        ("at", c_int64 * 4),
        *((name, c_int) for name in ("p_dtype", "g_dtype", "eight")),
        ("step", Step),
    )


class PageVisit(ctypes.Structure):
    """adamw_pages.h: page_visit."""

    _fields_ = (
        *((name, c_void_p) for name in ("frame", "spans")),
        *((name, c_int64) for name in ("n_spans", "used", "place")),
        *((name, c_int) for name in ("comes", "goes", "stage")),
        ("seconds", c_double),
    )


@register("adamw_pages", "cpu")
def adamw_pages_cpu(
    visits: Sequence[Visit], spans: Sequence[Sequence[PageSpan]], file: int, frames: Sequence[Tensor]
) -> int:
    rows = [(Span * len(row))(*map(_span, row)) for row in spans]
    c_visits = (PageVisit * len(visits))()
    for visit, row, c in zip(visits, rows, c_visits, strict=True):
        c.frame = None if visit.frame is None else visit.frame.data_ptr()
        c.spans, c.n_spans = ctypes.addressof(row), len(row)
        c.used, c.place, c.comes, c.goes = visit.used, visit.place, visit.comes, visit.goes
    own = (c_void_p * len(frames))(*(frame.data_ptr() for frame in frames))
    maps = state_maps() if any(len(span.offsets) == 4 for row in spans for span in row) else (None, None)
    error = load().adamw_pages(c_visits, len(visits), file, own, len(frames), *maps)
    number = {frame.data_ptr(): i for i, frame in enumerate(frames)}
    for visit, c in zip(visits, c_visits, strict=True):
        visit.stage, visit.seconds = Stage(c.stage), c.seconds
        visit.passed = number.get(c.frame) if visit.frame is None else None
    return int(error)


def _span(span: PageSpan) -> Span:
    at = (*span.offsets, 0, 0)[:4]
    p, g = (t.data_ptr() + span.start * t.element_size() for t in (span.p, span.g))
    n, eight = span.stop - span.start, len(span.offsets) == 4
    return Span(p, g, n, at, DTYPES[span.p.dtype], DTYPES[span.g.dtype], eight, step_numbers(span.step))
