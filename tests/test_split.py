"""data/split.py: two parts that share nothing, the same for the same seed, whatever the order of the file."""

import random

import pytest

from data.split import by_fraction, by_value, shared, shuffled

ROWS = [{"text": f"row {i}", "kind": ("train", "validation", "test")[i % 3], "n": i} for i in range(200)]


def held_out_texts(rows: list[dict], fraction: float, seed: int) -> set[str]:
    return {rows[i]["text"] for i in by_fraction(rows, fraction, seed, "rows")[1]}


@pytest.mark.parametrize(("fraction", "n"), [(0.1, 20), (0.5, 100), (0.001, 1), (0.999, 199)])
def test_a_fraction_is_held_out_and_nothing_is_lost_or_shared(fraction: float, n: int) -> None:
    training, held_out = by_fraction(ROWS, fraction, 0, "rows")
    assert len(held_out) == n
    assert sorted(training + held_out) == list(range(200))
    assert training == sorted(training)
    assert held_out == sorted(held_out)


def test_the_side_of_a_row_depends_on_content_and_seed_only() -> None:
    shuffled_rows = [dict(reversed(row.items())) for row in random.Random(1).sample(ROWS, len(ROWS))]
    assert held_out_texts(ROWS, 0.2, 0) == held_out_texts(shuffled_rows, 0.2, 0)
    assert held_out_texts(ROWS, 0.2, 0) != held_out_texts(ROWS, 0.2, 1)
    assert held_out_texts(ROWS, 0.1, 0) < held_out_texts(ROWS, 0.2, 0)


def test_the_chosen_rows_are_fixed_for_ever() -> None:
    assert by_fraction(ROWS[:20], 0.2, 0, "rows")[1] == [11, 12, 16, 18]


def test_held_out_rows_are_spread_evenly() -> None:
    """200 seeds of 20 in 200: each half of the file gets 10 on average, ± 4 standard errors of the mean."""
    first_half = [sum(i < 100 for i in by_fraction(ROWS, 0.1, seed, "rows")[1]) for seed in range(200)]
    deviation = (20 * 0.25 * 180 / 199 / 200) ** 0.5  # hypergeometric
    assert abs(sum(first_half) / 200 - 10) < 4 * deviation


def test_equal_rows_stay_on_one_side() -> None:
    rows = ROWS[:30] * 4
    for seed in range(20):
        training, held_out = by_fraction(rows, 0.2, seed, "rows")
        assert not {rows[i]["text"] for i in training} & {rows[i]["text"] for i in held_out}
        assert len(held_out) == 24
    training, held_out = by_fraction([ROWS[0]] * 9 + [ROWS[1]] * 3, 0.1, 0, "rows")
    assert (len(training), len(held_out)) == (9, 3)


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[:1] * 5])
def test_what_cannot_be_split(rows: list[dict]) -> None:
    with pytest.raises(ValueError, match=rf"^rows: {len(rows)} rows with one content cannot be split"):
        by_fraction(rows, 0.5, 0, "rows")


def test_rows_by_a_columns_value() -> None:
    assert by_value(ROWS, "kind=validation", "--eval-where", "rows") == list(range(1, 200, 3))
    assert by_value(ROWS, "n=7", "--eval-where", "rows") == [7]
    assert by_value([{"a": {"b": "x=y"}}, {"a": {"b": None}}], "a.b=x=y", "--eval-where", "rows") == [0]
    assert by_value([{"a": {"b": "x=y"}}, {"a": {"b": None}}], "a.b=", "--eval-where", "rows") == [1]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("kind", r"--eval-where must be COLUMN=VALUE, as in split=validation, got 'kind'$"),
        ("=x", r"--eval-where must be COLUMN=VALUE"),
        (
            "kind=dev",
            r"rows: --eval-where kind=dev: no row has that value; kind is train \(67\), validation \(67\)",
        ),
        ("n=-1", r"no row has that value; n is 0 \(1\), .* and 180 more$"),
        ("split=dev", r"rows: row 1: missing 'split'; found kind, n, text$"),
    ],
)
def test_rules_that_choose_nothing(rule: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        by_value(ROWS, rule, "--eval-where", "rows")


def test_shared_rows_are_counted() -> None:
    assert shared(ROWS[:50], ROWS[40:60]) == 10
    assert shared(ROWS[:50], ROWS[50:60]) == 0


def test_shuffles_differ_by_purpose_and_hold_every_number() -> None:
    assert sorted(shuffled(100, 0, "a")) == list(range(100))
    assert shuffled(100, 0, "a") == shuffled(100, 0, "a") != shuffled(100, 0, "b")
    assert shuffled(8, 0, "a") == [3, 4, 7, 2, 6, 5, 0, 1]
    assert shuffled(0, 0, "a") == []
