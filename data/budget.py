"""How much a chat template may do: a budget of steps and of text, spent by everything it computes.

    step    a loop turn, a call, an operator, a filter, a test, a print, ten nodes of a body       at most MAX_STEPS
    size    of a text its characters; of a list or dict MEMBER (about its memory) and the member's own size, for each
    paid    the size of whatever an operation makes, and a tenth of the size of what it goes through at most MAX_PAID

No value is larger than MAX_SIZE, where what appears twice in it counts twice: so a list that holds itself many times
over cannot be printed or compared for ever. An operation that can make more than it is given (text * number, join,
replace, indent, …) is looked at before it starts. Counting knows no clock: a template is refused everywhere or nowhere.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import SecurityError

MAX_STEPS = 1_000_000
MAX_PAID = 100_000_000
MAX_SIZE = 10_000_000
MEMBER = 100
MAX_BITS = 4096
MAX_DIGITS = 4000

_EMPTY: dict[str, str] = {}
LISTS: Any = (list, tuple, type(_EMPTY.keys()), type(_EMPTY.values()), type(_EMPTY.items()))
SIZED: Any = (*LISTS, str, dict, range)
PERCENT_WIDTH = re.compile(r"%(?:\(|[-#+ .0-9]*(?:[0-9]{4}|\*))")
BRACE_WIDTH = re.compile(r"\{[^{}]*:")


@dataclass
class _Spent:
    """What a rendering has used so far."""

    steps: int = 0
    paid: int = 0


_spent: ContextVar[_Spent] = ContextVar("what the template that is rendered now has used")


@contextmanager
def budget() -> Iterator[None]:
    """What runs inside has a budget of its own."""
    token = _spent.set(_Spent())
    try:
        yield
    finally:
        _spent.reset(token)


def step(count: int = 1) -> None:
    spent = _spent.get()
    spent.steps += count
    if spent.steps > MAX_STEPS:
        raise SecurityError(f"more than {MAX_STEPS:,} loop turns and calls")


def pay(amount: int) -> None:
    spent = _spent.get()
    spent.paid += amount
    if spent.paid > MAX_PAID:
        raise SecurityError(f"more than {MAX_PAID:,} characters written and gone through")


def made(value: Any) -> Any:
    """`value`, paid for."""
    pay(size(value))
    return value


def read(*values: Any) -> None:
    """Pay for going through `values` and all they hold."""
    for value in values:
        pay((len(value) * MEMBER if isinstance(value, range) else size(value)) // 10)


def touched(value: Any) -> None:
    """Pay for going through the members of `value`, and not what they hold."""
    if isinstance(value, SIZED):
        pay(len(value) * (1 if isinstance(value, str) else MEMBER) // 10)


def counted(items: Iterable, count: int = 1) -> Iterator:
    for item in items:
        step(count)
        yield item


def size(value: Any) -> int:
    """Raises SecurityError, before it has gone through all of it, for a value that is too large."""
    if isinstance(value, str):
        return fits(len(value))
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise SecurityError(f"a number of more than {MAX_BITS:,} bits")
    total = 0
    if isinstance(value, LISTS):
        for member in value:
            total = fits(total + MEMBER + size(member))
    elif isinstance(value, dict):
        for key, member in value.items():
            total = fits(total + 2 * MEMBER + size(key) + size(member))
    return total or 1


def fits(length: int) -> int:
    if length > MAX_SIZE:
        raise SecurityError(f"a text or list larger than {MAX_SIZE:,}")
    return length


# What an operation may make, before it starts


def check_binop(operator: str, left: Any, right: Any) -> None:
    if operator == "**" and not (_is_small(left) and _is_small(right)):
        raise SecurityError("** of numbers above 64")
    if operator == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(value, str | list | tuple) and isinstance(times, int):
                fits(size(value) * max(0, times))
    if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
        fits(len(left) + len(right))
    if operator == "%" and isinstance(left, str):
        check_percent(left, right)


def check_percent(text: str, *values: Any) -> None:
    """text % values"""
    if PERCENT_WIDTH.search(text):
        raise SecurityError("a width of more than 999, a * or a name in a % format")
    fits(len(text) + text.count("%") * (size(values) + 1000))


def check_format(text: str, *args: Any, **kwargs: Any) -> None:
    """text.format(…)"""
    if BRACE_WIDTH.search(text.replace("{{", "").replace("}}", "")):
        raise SecurityError("a width or other instruction in format()")
    fits(len(text) + text.count("{") * size([*args, *kwargs.values()]))


def check_replace(text: str, old: Any = "", new: Any = "", count: Any = None) -> None:
    text, old, new = str(text), str(old), str(new)
    found = text.count(old)
    if isinstance(count, int) and 0 <= count < found:
        found = count
    fits(len(text) + found * (len(new) - len(old)))


def check_indent(text: str, width: int | str = 4, *_: Any, **__: Any) -> None:
    fits(len(text) + (len(str(text).splitlines()) + 1) * (len(width) if isinstance(width, str) else width))


def check_search_from_the_end(text: str, pattern: Any = None, *_: Any, **__: Any) -> None:
    """text.rfind(pattern): Python's takes len(text) · len(pattern) at worst, its find does not."""
    if isinstance(pattern, str):
        pay(len(text) * len(pattern) // 10)


def check_as_list(value: Any, *_: Any, **__: Any) -> None:
    """list(value), sorted(value), and what cuts a text into words"""
    if isinstance(value, str):
        fits(len(value) * MEMBER)


def check_digits(value: Any, *_: Any, **__: Any) -> None:
    """int(value)"""
    if isinstance(value, str) and len(value) > MAX_DIGITS:
        raise SecurityError(f"a number of more than {MAX_DIGITS:,} digits")


def check_round(_: Any, precision: Any = 0, *__: Any, **___: Any) -> None:
    if not _is_small(precision):
        raise SecurityError("rounding to more than 64 digits")


def check_sum(_: Any, __: Any = None, start: Any = 0) -> None:
    if not isinstance(start, int | float):
        raise SecurityError("a sum that does not start at a number")


def join(separator: str, items: Iterable) -> str:
    """separator.join(items), each item as text."""
    texts, length = [], 0
    for item in counted(items):
        texts.append(str(item))
        length = fits(length + len(texts[-1]) + len(separator) * (len(texts) > 1))
    return separator.join(texts)


def tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """transformers' filter: <>&' and what is not ASCII stay as they are."""
    for space in (indent, *(separators or ())):
        if (space if isinstance(space, int) else len(space or "")) > 64:
            raise SecurityError("tojson with an indent or a separator above 64")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if indent is None:
        return encoder.encode(value)
    pieces, length = [], 0
    for piece in encoder.iterencode(value):
        pieces.append(piece)
        length = fits(length + len(piece))
    return "".join(pieces)


def _is_small(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= 64
