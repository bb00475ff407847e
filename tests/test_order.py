"""data/order.py: every epoch holds each example once, and a step is a pure function of its number, packed or not."""

import random

import pytest
import torch

from data import DataOrder, epoch_order, step_rows

LENGTHS = [int(random.Random(i).lognormvariate(4, 0.7)) % 400 + 1 for i in range(203)]


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch(n: int) -> None:
    assert sorted(epoch_order(n, 0, 0)) == list(range(n))
    assert epoch_order(n, 3, 5) == epoch_order(n, 3, 5)
    if n == 1000:
        orders = {tuple(epoch_order(n, seed, epoch)) for seed in (-1, 0, 1, 2) for epoch in range(4)}
        assert len(orders) == 16


def test_the_order_is_the_same_on_every_machine() -> None:
    """Written down once: a resumed run must find its place on another version of numpy too."""
    assert epoch_order(10, 0, 0) == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]


def test_every_place_is_equally_likely_for_every_row() -> None:
    """χ² over 2,000 epochs of 5 rows; 16 degrees of freedom, 99.9 % quantile 39.3."""
    counts = torch.zeros(5, 5)
    for epoch in range(2000):
        counts[torch.arange(5), torch.tensor(epoch_order(5, 0, epoch))] += 1
    assert ((counts - 400) ** 2 / 400).sum() < 39.3


@pytest.mark.parametrize(("n", "batch_size"), [(10, 5), (10, 3), (3, 8), (1, 4), (7, 7)])
def test_steps_walk_through_the_epochs(n: int, batch_size: int) -> None:
    steps = 3 * n
    walked = [row for step in range(steps) for row in step_rows(n, batch_size, step, seed=1)]
    epochs = [walked[start : start + n] for start in range(0, len(walked), n)]
    assert len(walked) == steps * batch_size
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] == epoch_order(n, 1, 0)
    assert epochs[1] == epoch_order(n, 1, 1)


@pytest.mark.parametrize(("n", "batch_size", "step"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_bad_steps(n: int, batch_size: int, step: int) -> None:
    with pytest.raises(ValueError, match=f"got {n}, {batch_size} and {step}"):
        step_rows(n, batch_size, step, seed=0)


WAYS = [{}, {"capacity": 400}, {"group": 4}, {"group": 300}]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_epoch_holds_each_example_once_in_another_order(way: dict) -> None:
    order = DataOrder(LENGTHS, 7, **way)
    epochs = [order.epoch(epoch) for epoch in range(4)]
    for rows in epochs:
        assert len(rows) == order.n_rows
        assert sorted(i for row in rows for i in row) == list(range(len(LENGTHS)))
    assert len({tuple(i for row in rows for i in row) for rows in epochs}) == 4


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_step_depends_on_nothing_but_its_number(way: dict) -> None:
    """A resumed run asks for step 61 first."""
    order = DataOrder(LENGTHS, 7, **way)
    steps = [order.step(8, step) for step in range(70)]
    assert DataOrder(list(LENGTHS), 7, **way).step(8, 61) == steps[61]
    assert DataOrder(LENGTHS, 8, **way).step(8, 61) != steps[61]
    walked = [row for rows in steps for row in rows]
    assert walked[: order.n_rows] == order.epoch(0)
    assert walked[order.n_rows : 2 * order.n_rows] == order.epoch(1)


def test_plain_order_is_step_rows() -> None:
    order = DataOrder(LENGTHS, 3)
    assert [row for (row,) in order.step(8, 40)] == step_rows(len(LENGTHS), 8, 40, seed=3)


def test_packed_rows_fit_and_change_their_company() -> None:
    order = DataOrder(LENGTHS, 0, capacity=400)
    assert all(sum(LENGTHS[i] for i in row) <= 400 for epoch in range(3) for row in order.epoch(epoch))
    assert order.n_rows <= sum(LENGTHS) / 400 * 1.1 + 1
    short = DataOrder([100] * 40, 0, capacity=400)
    assert {frozenset(row) for row in short.epoch(0)} != {frozenset(row) for row in short.epoch(1)}
    with pytest.raises(ValueError, match="does not fit a row of 100"):
        DataOrder(LENGTHS, 0, capacity=100).step(1, 0)


def cells(order: DataOrder, group: int, epochs: int) -> int:
    """Size of the tensors of all micro-batches over whole epochs laid end to end, cut where a trainer cuts them."""
    rows = [LENGTHS[i] for epoch in range(epochs) for (i,) in order.epoch(epoch)]
    parts = [rows[start : start + group] for start in range(0, len(rows), group)]
    return sum(max(part) * len(part) for part in parts)


@pytest.mark.parametrize("group", [4, 8])
def test_grouped_micro_batches_pad_little_in_every_epoch(group: int) -> None:
    """203 is no multiple of the group: the cuts must stay in place over the borders of epochs."""
    text = 6 * sum(LENGTHS)
    plain = cells(DataOrder(LENGTHS, 1), group, 6) / text - 1
    grouped = cells(DataOrder(LENGTHS, 1, group=group), group, 6) / text - 1
    assert grouped < plain / 3


def test_grouped_micro_batches_come_in_no_order_of_length() -> None:
    order = DataOrder(LENGTHS, 0, group=4)
    rows = torch.tensor([LENGTHS[i] for (i,) in order.epoch(0)][:200], dtype=torch.float32).view(50, 4).mean(dim=1)
    assert abs(torch.corrcoef(torch.stack([torch.arange(50.0), rows]))[0, 1]) < 0.451  # 99.9 % of random orders


def test_padding_is_the_share_of_the_tensors() -> None:
    order = DataOrder([1, 3, 4], 0)
    lengths = [order.lengths[i] for (i,) in order.epoch(0)]
    assert order.padding(2) == pytest.approx(1 - 8 / (2 * max(lengths[:2]) + lengths[2]))
    assert order.padding(1) == 0
    assert DataOrder([1, 3, 4], 0, capacity=4).padding(2) == 0
