"""A value of a row by the path of its column, and how rows and values are named in errors.

    question            the column `question`
    data.question       `question` in the object that the column `data` holds
    answers.text.0      the first of the list `text` in the object `answers`

A column whose own name has dots in it is found by that name first.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

MAX_NAMES, MAX_NAME_LENGTH = 20, 60


def lookup(row: Mapping[str, Any], path: str, where: str) -> Any:
    """The value at `path`. Raises ValueError, beginning with `where`, that says which step of the path is missing."""
    if path in row:
        return row[path]
    value: Any = row
    for step in path.split("."):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and re.fullmatch(r"[0-9]{1,9}", step) and int(step) < len(value):
            value = value[int(step)]
        else:
            raise ValueError(f"{where}: missing {names([path], repr)}; {_what_is_there(row, value, step)}")
    return value


def as_text(value: Any, path: str, where: str) -> str:
    """Text as it is, null as nothing, a number or true and false as JSON writes them.

    Raises ValueError for a list, an object or another type, for a number that is not finite, and for text with half a
    character (a lone surrogate) in it.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return checked_text(value, path, where)
    finite = isinstance(value, float) and math.isfinite(value)
    if finite or isinstance(value, bool | int):
        return json.dumps(value)
    inside = "; name one thing in it, as in " + names([f"{path}.{_first_step(value)}"]) if _first_step(value) else ""
    raise ValueError(f"{where}: {names([path], repr)} must be text or a number, found {kind_of(value)}{inside}")


def checked_text(value: Any, path: str, where: str) -> str:
    """`value`, which must be text. Raises ValueError for another type and for a lone surrogate."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {names([path], repr)} must be text, found {kind_of(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {names([path], repr)} has half a character at position {error.start}") from error
    return value


def names(found: Iterable[object], spell: Callable[[str], str] = str) -> str:
    """A list of names for one line of an error: few, short, and without control characters."""
    every = [str(name) for name in found]
    cut = [name if len(name) <= MAX_NAME_LENGTH else f"{name[:MAX_NAME_LENGTH]}…" for name in every[:MAX_NAMES]]
    shown = ", ".join(spell(name) if name.isprintable() else repr(name) for name in cut)
    return shown if len(every) <= MAX_NAMES else f"{shown} and {len(every) - MAX_NAMES:,} more"


def twice(found: Iterable[str]) -> str | None:
    """The first name that has stood before, if any."""
    seen: set[str] = set()
    for name in found:
        if name in seen:
            return name
        seen.add(name)
    return None


def kind_of(value: Any) -> str:
    """A value's type, in the words of JSON."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, float) and not math.isfinite(value):
        return "a number that is not finite"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    words = {dict: "an object", str: "text", int: "a number", float: "a number", type(None): "null"}
    return words.get(type(value), type(value).__name__)


def _what_is_there(row: Mapping[str, Any], value: Any, step: str) -> str:
    if value is row:
        return f"found {names(sorted(row)) or 'nothing'}"
    if isinstance(value, Mapping):
        return f"there is no {names([step], repr)} among {names(sorted(value)) or 'nothing'}"
    return f"{names([step], repr)} is looked for in {kind_of(value)}"


def _first_step(value: Any) -> str | None:
    if isinstance(value, Mapping):
        return next((str(key) for key in value), None)
    return "0" if isinstance(value, list) and value else None
