"""optim/layout: every element of every item has its place, once, and no block of 256 is cut by a page's end."""

import random

import pytest
import torch

from optim.layout import Field, Item, lay_out, values_of

PAIR = (Field("a", torch.float32), Field("b", torch.float64))
BLOCKS = (Field("codes", torch.uint8), Field("scale", torch.float32, per=256))


@pytest.mark.parametrize("page_bytes", [3400, 5000, 16384, 10**6])
def test_every_element_has_one_place(page_bytes):
    items = [Item(random.choice([1, 7, 255, 256, 257, 1000, 9001]), random.choice([PAIR, BLOCKS])) for _ in range(40)]
    pages = lay_out(items, page_bytes)
    stops = [0] * len(items)
    for page in pages:
        taken = torch.zeros(page_bytes, dtype=torch.int32)
        for span in page.spans:
            assert span.start == stops[span.item], "in order, nothing left out"
            assert span.start % 256 == 0
            stops[span.item] = span.stop
            for values, field in zip(
                values_of(taken.byte(), span, items[span.item]), items[span.item].fields, strict=True
            ):
                assert values.dtype == field.dtype
                assert len(values) == -(-(span.stop - span.start) // field.per)
            for at, field in zip(span.offsets, items[span.item].fields, strict=True):
                assert at % 64 == 0
                taken[at : at + field.nbytes(span.stop - span.start)] += 1
        assert taken.max() == 1, "no two values share a byte"
        assert taken.nonzero().max() < page.used <= page_bytes
    assert stops == [item.numel for item in items]


def test_a_field_is_a_view_of_its_page():
    item = Item(300, BLOCKS)
    (page,) = lay_out([item], 4096)
    frame = torch.zeros(4096, dtype=torch.uint8)
    codes, scale = values_of(frame, page.spans[0], item)
    codes.fill_(7)
    scale.fill_(2.5)
    assert frame[:300].tolist() == [7] * 300
    assert frame[320:328].view(torch.float32).tolist() == [2.5, 2.5]


def test_an_item_without_elements_takes_no_room():
    assert lay_out([Item(0, PAIR)], 4096) == []


def test_a_page_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="page_bytes must hold 256 elements of every parameter, got 3071"):
        lay_out([Item(3, PAIR), Item(257, PAIR)], 3071)
