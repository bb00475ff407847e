"""The demo's task: a customer's message becomes a record that a shop's order system can read.

    input    Hi, this is Chloé Lambert. Could you send three oak stools to Leeds on Friday at 3 pm?
    output   {"name": "Chloé Lambert", "item": "oak stools", "quantity": 3, "place": "Leeds", "day": "Friday",
              "time": "3 pm"}                                                                on one line

Rows come from sentence forms and word lists, so every answer is known to be right. Names, items, places, days and times
are copied from the text, quantities become numbers, and what is not said is null.

    train        known words in known forms
    recombined   the same words and forms in rows that training never shows: a checksum of the text decides the side
    unseen       names, things, places, months and sentence forms that are nowhere in training

A row is a pure function of (split, seed, its number). Rows have the Alpaca shape {instruction, input, output}.
Left out: spelling mistakes, several items in one message, other languages than English around the words.
"""

import json
import random
import zlib
from collections.abc import Sequence

from .task_words import (
    FIRST_NAMES,
    FORMS,
    KINDS,
    LAST_NAMES,
    MONTHS,
    NUMBER_WORDS,
    PLACES,
    THINGS,
    WEEKDAYS,
    WHOLE_NAMES,
)

KEYS = ("name", "item", "quantity", "place", "day", "time")
SPLITS = ("train", "recombined", "unseen")
INSTRUCTION = "Order to JSON: " + ", ".join(KEYS) + "."


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
    quantity, number, thing = _thing(rng, words)
    day, on = _day(rng, words)
    name, place, time = _name(rng, words), _pick(rng, PLACES[words]), _time(rng)
    items = f"{quantity} {thing}"
    slots = {"name": name, "place": place, "time": time, "day": day, "on": on, "On": _capital(on)}
    if "{some}" in form or "{bare}" in form:
        number, thing = None, _plural(thing) if number == 1 else thing
    text = form.format(**slots, items=items, Items=_capital(items), some=f"some {thing}", bare=thing)
    record = {
        "name": name if "{name}" in form else None,
        "item": thing,
        "quantity": number,
        "place": place if "{place}" in form else None,
        "day": day if "{day}" in form or "{on}" in form or "{On}" in form else None,
        "time": time if "{time}" in form else None,
    }
    return text, record


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _pick(rng: random.Random, choices: Sequence[str]) -> str:
    """Only random() is promised to give the same numbers in every Python; choice() is not."""
    return choices[int(rng.random() * len(choices))]


def _name(rng: random.Random, words: str) -> str:
    if rng.random() < 0.2:
        return _pick(rng, WHOLE_NAMES[words])
    return f"{_pick(rng, FIRST_NAMES[words])} {_pick(rng, LAST_NAMES[words])}"


def _thing(rng: random.Random, words: str) -> tuple[str, int | None, str]:
    """(how the quantity is said, its number, the thing in the singular or plural that goes with it)."""
    thing = _pick(rng, THINGS[words])
    if rng.random() < 0.5:
        thing = f"{_pick(rng, KINDS)} {thing}"
    kind = rng.random()
    if kind < 0.3:
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


def _day(rng: random.Random, words: str) -> tuple[str, str]:
    """(the day, the day with its preposition)."""
    kind = rng.random()
    if kind < 0.15:
        return "tomorrow", "tomorrow"
    date = f"{1 + int(rng.random() * 28)} {_pick(rng, MONTHS[words])}"
    day = _pick(rng, WEEKDAYS) if kind < 0.65 else date
    return day, f"on {day}"


def _time(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.1:
        return "noon"
    if kind < 0.5:
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
