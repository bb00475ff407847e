"""The demo's task: a customer's message becomes a record that a shop's order system can read.

    input    Hi, this is Ms Nguyễn Thị Lan. Please send three oak stools to 12 Rose Street on Friday at 3 pm.
    output   {"name": "Ms Nguyễn Thị Lan", "item": "oak stools", "quantity": 3, "address": "12 Rose Street",
              "when": "Friday at 3 pm"}                                                      on one line

Rows come from sentence forms and word lists, so every answer is known to be right. Names, items, addresses, days and
times are copied from the text, quantities become numbers, and an address or day that is not said is null.

    train        known words in known forms
    recombined   the same words and forms in rows that training never shows: a checksum of the text decides the side
    unseen       names, things, streets, months and sentence forms that are nowhere in training

A row is a pure function of (split, seed, its number). Rows have the Alpaca shape {instruction, input, output}.
Left out: spelling mistakes, several items in one message, other languages than English around the words.
"""

import json
import random
import zlib
from collections.abc import Sequence

from .task_words import (
    FORMS,
    KINDS,
    LAST_NAMES,
    MONTHS,
    NUMBER_WORDS,
    STREET_KINDS,
    STREETS,
    THINGS,
    TITLES,
    WEEKDAYS,
    WHOLE_NAMES,
    WHOLE_STREETS,
)

KEYS = ("name", "item", "quantity", "address", "when")
SPLITS = ("train", "recombined", "unseen")
INSTRUCTION = "To JSON: " + ", ".join(KEYS) + "."


def make_split(split: str, n: int, seed: int = 0) -> list[dict[str, str]]:
    """`n` different rows {instruction, input, output}; the first k rows do not depend on n.

    Raises ValueError when the split is not train, recombined or unseen.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    words = "unseen" if split == "unseen" else "train"
    rng = random.Random(f"{split} {seed}")
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < n:
        text, record = _draw(rng, words)
        if split == "unseen" or _side(text) == split:
            rows[text] = {"instruction": INSTRUCTION, "input": text, "output": json.dumps(record, ensure_ascii=False)}
    return list(rows.values())


def _side(text: str) -> str:
    """Every text belongs to one side for ever, so that no seed or size lets a training row into the held-out ones."""
    return "recombined" if zlib.crc32(text.encode()) % 5 == 0 else "train"


def _draw(rng: random.Random, words: str) -> tuple[str, dict[str, str | int | None]]:
    """One message and its record."""
    form = _pick(rng, FORMS[words])
    name, address = _name(rng, words), _address(rng, words)
    quantity, number, thing = _thing(rng, words)
    when, on = _when(rng, words)
    items = f"{quantity} {thing}"
    slots = {"name": name, "address": address, "when": when, "on": on, "items": items}
    text = form.format(**slots, On=_capital(on), Items=_capital(items))
    record: dict[str, str | int | None] = {
        "name": name,
        "item": thing,
        "quantity": number,
        "address": address if "{address}" in form else None,
        "when": when if any(slot in form for slot in ("{when}", "{on}", "{On}")) else None,
    }
    return _capital(text), record


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _pick(rng: random.Random, choices: Sequence[str]) -> str:
    """Only random() is promised to give the same numbers in every Python; choice() is not."""
    return choices[int(rng.random() * len(choices))]


def _name(rng: random.Random, words: str) -> str:
    name = _pick(rng, WHOLE_NAMES[words] if rng.random() < 0.25 else LAST_NAMES[words])
    return f"{_pick(rng, TITLES)} {name}"


def _address(rng: random.Random, words: str) -> str:
    number = 1 + int(rng.random() * 120)
    if rng.random() < 0.15:
        return f"{number} {_pick(rng, WHOLE_STREETS[words])}"
    return f"{number} {_pick(rng, STREETS[words])} {_pick(rng, STREET_KINDS)}"


def _thing(rng: random.Random, words: str) -> tuple[str, int, str]:
    """(how the quantity is said, its number, the thing in the singular or plural that goes with it)."""
    thing = f"{_pick(rng, KINDS)} {_pick(rng, THINGS[words])}"
    kind = rng.random()
    if kind < 0.2:
        return "an" if thing[0] in "aeiou" else "a", 1, thing
    if kind < 0.6:
        word = _pick(rng, list(NUMBER_WORDS))
        return word, NUMBER_WORDS[word], _plural(thing)
    number = 2 + int(rng.random() * 98)
    return str(number), number, _plural(thing)


def _plural(thing: str) -> str:
    if thing.endswith("shelf"):
        return thing[:-1] + "ves"
    return thing + ("es" if thing.endswith(("x", "ch", "sh", "s")) else "s")


def _when(rng: random.Random, words: str) -> tuple[str, str]:
    """(a day, in some rows with a time; the same with its preposition)."""
    kind = rng.random()
    date = f"{1 + int(rng.random() * 28)} {_pick(rng, MONTHS[words])}"
    day = "tomorrow" if kind < 0.15 else _pick(rng, WEEKDAYS) if kind < 0.65 else date
    when = f"{day} at {_time(rng)}" if rng.random() < 0.4 else day
    return when, when if day == "tomorrow" else f"on {when}"


def _time(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.1:
        return "noon"
    if kind < 0.6:
        hour = 7 + int(rng.random() * 13)
        return f"{(hour - 1) % 12 + 1} {'am' if hour < 12 else 'pm'}"
    return f"{8 + int(rng.random() * 12)}:{5 * int(rng.random() * 12):02d}"


def score(outputs: Sequence[str], rows: Sequence[dict[str, str]]) -> list[bool]:
    """Whether each output is JSON equal to the row's: the same keys, values and types. The order of keys is free."""
    return [_canonical(output) == _canonical(row["output"]) for output, row in zip(outputs, rows, strict=True)]


def field_scores(outputs: Sequence[str], rows: Sequence[dict[str, str]]) -> dict[str, float]:
    """For each key, the share of outputs whose value is right: it shows what a wrong record got wrong."""
    right = dict.fromkeys(KEYS, 0)
    for output, row in zip(outputs, rows, strict=True):
        found, wanted = _parse(output), json.loads(row["output"])
        for key in KEYS:
            right[key] += isinstance(found, dict) and key in found and json.dumps(found[key]) == json.dumps(wanted[key])
    return {key: count / max(len(rows), 1) for key, count in right.items()}


def _canonical(output: str) -> str | None:
    """One spelling per value, so that 3, 3.0, "3" and true differ; None when it is no JSON object."""
    parsed = _parse(output)
    return json.dumps(parsed, sort_keys=True) if isinstance(parsed, dict) else None


def _parse(output: str) -> object:
    try:
        return json.loads(output)
    except (ValueError, RecursionError):
        return None
