"""Where tensors lie in pages of a fixed size.

An item is a number of elements with some fields: an array each, of one value for every `per` elements. Those values of
all its fields that belong to the same elements are used together, so they lie in the same page: an item is cut into
spans of elements, and a page is a row of spans.

    page 0   | a: field 0 | a: field 1 | b: field 0 | b: field 1 | c, elements 0 … 511: field 0 | field 1 |
    page 1   | c, elements 512 …: field 0               | field 1               | d: …

A span begins at a multiple of 256 elements, so that a block of up to 256 elements that share a value never has a page
boundary inside.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SPAN_STEP = 256  # elements: every span but an item's last has a multiple of this many
ALIGNMENT = 64  # bytes: a cache line


@dataclass(frozen=True)
class Field:
    """One array of an item."""

    name: str
    dtype: torch.dtype
    per: int = 1
    """Elements that share one value."""

    def values(self, n_elements: int) -> int:
        return math.ceil(n_elements / self.per)

    def nbytes(self, n_elements: int) -> int:
        return self.values(n_elements) * self.dtype.itemsize


@dataclass(frozen=True)
class Item:
    """Something with state: so many elements, these fields."""

    numel: int
    fields: tuple[Field, ...]


@dataclass(frozen=True)
class Span:
    """Elements start … stop - 1 of item number `item`, and at which byte of its page each field's values begin."""

    item: int
    start: int
    stop: int
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Page:
    """The spans of a page, and how many of its bytes they use."""

    spans: tuple[Span, ...]
    used: int


def lay_out(items: Sequence[Item], page_bytes: int) -> list[Page]:
    """Cut the items into spans and the spans into pages, in order.

    Raises ValueError when a page cannot hold 256 elements of some item.
    """
    pages: list[Page] = []
    spans: list[Span] = []
    used = 0
    for number, item in enumerate(items):
        start = 0
        while start < item.numel:
            n_elements = min(item.numel - start, _elements_that_fit(item, page_bytes - used))
            if item.numel - start > n_elements:
                n_elements -= n_elements % SPAN_STEP
            if n_elements == 0:
                if not spans:
                    raise ValueError(f"page_bytes must hold {SPAN_STEP} elements of every parameter, got {page_bytes}")
                pages.append(Page(tuple(spans), used))
                spans, used = [], 0
                continue
            offsets = []
            for field in item.fields:
                offsets.append(used)
                used += _aligned(field.nbytes(n_elements))
            spans.append(Span(number, start, start + n_elements, tuple(offsets)))
            start += n_elements
    return [*pages, Page(tuple(spans), used)] if spans else pages


def values_of(frame: Tensor, span: Span, item: Item) -> list[Tensor]:
    """The values of each field of a span: views into its page's frame, uint8 (page_bytes,)."""
    n_elements = span.stop - span.start
    views = zip(span.offsets, item.fields, strict=True)
    return [frame[at : at + field.nbytes(n_elements)].view(field.dtype) for at, field in views]


def _elements_that_fit(item: Item, room: int) -> int:
    """The whole item if it fits, else a multiple of 256 elements."""
    if sum(_aligned(field.nbytes(item.numel)) for field in item.fields) <= room:
        return item.numel
    step = sum(field.nbytes(SPAN_STEP) for field in item.fields)
    return max(0, room - ALIGNMENT * len(item.fields)) // step * SPAN_STEP


def _aligned(n_bytes: int) -> int:
    return math.ceil(n_bytes / ALIGNMENT) * ALIGNMENT
