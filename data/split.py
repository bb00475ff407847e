"""Rows become two parts that share none: those that train, and those held out.

by fraction    `eval_fraction` of the rows, chosen by a hash of the seed and the row's content: the order of the file
               does not matter, and equal rows always fall on one side
by value       the rows whose column has a value: split=validation
by file        is no matter of this room: the held-out file is read as it is, and shared rows are counted
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .columns import as_text, lookup, names


def by_fraction(
    rows: Sequence[Mapping[str, Any]], fraction: float, seed: int, path: str
) -> tuple[list[int], list[int]]:
    """(training, held out) row numbers, each in the order of the file; at least one row on each side.

    Raises ValueError for a fraction outside (0, 1) and when the rows are all equal or there is only one.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"--eval-fraction must lie between 0 and 1, got {fraction}")
    equal_rows: dict[bytes, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        equal_rows[hashlib.sha256(f"{seed} {fingerprint(row)}".encode()).digest()].append(i)
    if len(equal_rows) < 2:
        raise ValueError(f"{path}: {len(rows)} rows with one content cannot be split; give --eval-data a file")
    wanted = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
    held_out: list[int] = []
    for _, group in sorted(equal_rows.items()):
        if len(held_out) + len(group) <= wanted:
            held_out += group
    held_out = sorted(held_out) or sorted(equal_rows.values(), key=len)[0]
    chosen = set(held_out)
    return [i for i in range(len(rows)) if i not in chosen], held_out


def by_value(rows: Sequence[Mapping[str, Any]], rule: str, flag: str, path: str) -> list[int]:
    """The numbers of the rows that `rule` (COLUMN=VALUE) chooses.

    Raises ValueError, naming `flag`, for a rule of another form, one that no row fits, and a row without the column.
    """
    column, equals, wanted = rule.partition("=")
    if not column or not equals:
        raise ValueError(f"{flag} must be COLUMN=VALUE, as in split=validation, got {rule!r}")
    values = values_of(rows, column, path)
    chosen = [i for i, value in enumerate(values) if value == wanted]
    if not chosen:
        raise ValueError(f"{path}: {flag} {rule}: no row has that value; {column} is {commonest(values)}")
    return chosen


def values_of(rows: Sequence[Mapping[str, Any]], column: str, path: str) -> list[str]:
    """Each row's value in a column, as text. Raises ValueError for a row without it."""
    places = [f"{path}: row {i}" for i in range(1, len(rows) + 1)]
    return [as_text(lookup(row, column, place), column, place) for row, place in zip(rows, places, strict=True)]


def commonest(values: Sequence[str]) -> str:
    """The values and how often each is there, the commonest first."""
    return names(f"{value} ({count:,})" for value, count in Counter(values).most_common())


def shared(rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> int:
    """How many of `others` are, value for value, also among `rows`."""
    known = {fingerprint(row) for row in rows}
    return sum(fingerprint(row) in known for row in others)


def fingerprint(row: Mapping[str, Any]) -> str:
    """A row's content in one spelling, whatever the order of its columns."""
    return json.dumps(row, sort_keys=True, default=str)


def shuffled(n: int, seed: int, purpose: str) -> list[int]:
    """The numbers 0 … n − 1 in a random order, the same everywhere for the same seed and purpose."""
    key = np.frombuffer(hashlib.sha256(f"{purpose} {seed}".encode()).digest()[:16], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable").tolist()
