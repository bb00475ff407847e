"""data/batch.py: padding is no text, examples of a row have ids of their own, and none is learnt from another."""

import pytest
import torch

from data import Encoded, collate, collate_packed


def test_collate_pads_on_the_right() -> None:
    batch = collate([Encoded([5, 2, 2], [0, 0, 1]), Encoded([7], [1])], pad_id=2)
    assert batch.input_ids.tolist() == [[5, 2, 2], [7, 2, 2]]
    assert batch.completion_mask.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert {tensor.dtype for tensor in batch} == {torch.int64}
    with pytest.raises(ValueError, match="a batch needs at least one example"):
        collate([], pad_id=0)


def test_packed_examples_lie_end_to_end() -> None:
    rows = [[Encoded([5, 6], [1, 1]), Encoded([7, 8, 9], [1, 0, 1])], [Encoded([4], [1])]]
    batch = collate_packed(rows, pad_id=2)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [4, 2, 2, 2, 2]]
    assert batch.completion_mask.tolist() == [[1, 1, 0, 0, 1], [1, 0, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 2, 2, 2], [1, 0, 0, 0, 0]]
