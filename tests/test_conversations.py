"""data/conversations.py: single turns become conversations; how often each row is used is counted, not believed."""

from collections import Counter
from itertools import permutations

import pytest

from data.conversations import merge_turns


def row(i: int, system: str | None = None) -> list[dict[str, str]]:
    head = [{"role": "system", "content": system}] if system is not None else []
    return [*head, {"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]


def numbers(conversation: list[dict[str, str]]) -> list[int]:
    """The rows that a conversation is made of; checks that each answer follows its question."""
    turns = [message for message in conversation if message["role"] != "system"]
    questions, answers = turns[::2], turns[1::2]
    assert all(message["role"] == "user" for message in questions)
    assert [q["content"][1:] for q in questions] == [a["content"][1:] for a in answers]
    return [int(q["content"][1:]) for q in questions]


@pytest.mark.parametrize(("n", "turns"), [(2, 2), (3, 3), (10, 2), (10, 4), (101, 3)])
def test_with_reuse_each_row_stands_once_in_each_turn(n: int, turns: int) -> None:
    merged = merge_turns([row(i) for i in range(n)], turns, 0, reuse=True, path="rows")
    groups = [numbers(conversation) for conversation in merged]
    assert len(groups) == n
    for place in range(turns):
        assert sorted(group[place] for group in groups) == list(range(n))
    assert all(len(set(group)) == turns for group in groups)
    assert [group[0] for group in groups] == list(range(n))


@pytest.mark.parametrize(("n", "turns"), [(10, 2), (11, 2), (7, 3), (3, 3)])
def test_once_uses_each_row_once(n: int, turns: int) -> None:
    merged = merge_turns([row(i) for i in range(n)], turns, 0, reuse=False, path="rows")
    groups = [numbers(conversation) for conversation in merged]
    assert sorted(i for group in groups for i in group) == list(range(n))
    assert [len(group) for group in groups[:-1]] == [turns] * (len(groups) - 1)
    assert len(groups) == -(-n // turns)


def test_one_turn_changes_nothing() -> None:
    rows = [row(i) for i in range(5)]
    assert merge_turns(rows, 1, 0, reuse=True, path="rows") == rows


@pytest.mark.parametrize("reuse", [True, False])
def test_the_merge_depends_on_the_seed_only(reuse: bool) -> None:
    rows = [row(i) for i in range(50)]
    first, again, other = (merge_turns(rows, 2, seed, reuse=reuse, path="rows") for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_every_choice_of_rows_is_as_likely_as_any_other() -> None:
    """Three turns of four rows over 1200 seeds: what follows row 0 is each of 6 pairs, χ² below its 99.9% point."""
    rows = [row(i) for i in range(4)]
    seen = Counter(tuple(numbers(merge_turns(rows, 3, seed, reuse=True, path="rows")[0])[1:]) for seed in range(1200))
    assert set(seen) == set(permutations([1, 2, 3], 2))
    assert sum((count - 200) ** 2 / 200 for count in seen.values()) < 20.5  # 5 degrees of freedom


def test_a_shared_system_message_is_kept_once() -> None:
    merged = merge_turns([row(i, "Be kind.") for i in range(4)], 2, 0, reuse=True, path="rows")
    for conversation in merged:
        assert [message["role"] for message in conversation] == ["system", "user", "assistant", "user", "assistant"]


@pytest.mark.parametrize(
    ("rows", "turns", "message"),
    [
        ([row(0), row(1)], 0, "--turns must lie between 1 and 100, got 0"),
        ([row(0), row(1)], 10**12, "--turns must lie between 1 and 100"),
        ([row(0), row(1)], 3, "rows: 3 turns need at least 3 different rows, there are 2"),
        ([row(0), row(1) + row(2)], 2, "rows: row 2 has 2 turns; --turns merges rows of one turn"),
        ([row(0, "a"), row(1, "b")], 2, "rows: row 2 has another system message than row 1"),
        ([row(0, "a"), row(1)], 2, "rows: row 2 has another system message than row 1"),
    ],
)
def test_rows_that_do_not_merge(rows: list, turns: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        merge_turns(rows, turns, 0, reuse=True, path="rows")
