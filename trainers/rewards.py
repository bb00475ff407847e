"""Rewards: what a completion is worth, by rules that can be checked. A reward maps answers to numbers, one each.

    name             is
    exact            1 if the text is the wanted answer, white space around it aside, else 0
    number           1 if its number is the wanted one (GSM8K: the number after "####", else the last in the text)
    json             1 if the text is JSON
    json_fields      share of the wanted record's fields that it has, with equal values; json_fields:a,b for these alone
    regex:PATTERN    1 if the whole text matches the pattern ("." matches a newline too)
    length:N         max(0, 1 - |L - N| / N) for a completion of L tokens
    overlong:C       soft punishment of long answers (DAPO, arXiv 2503.14476, eq. 13): 0 up to L = M - C, then
                     (M - C - L) / C, down to -1 at L = M, the longest that is allowed
    module:function  your own; also path/to/file.py:function

Your own is called once for a batch of rollouts and returns one number for each answer, or None where it does not apply:

    def shorter_is_better(answers):
        return [1 / len(a.ids) for a in answers]                 # fields: see Answer below

Several rewards add up to Σ w_k r_k over those that apply. Where none applies, the answer has no reward (NaN) and takes
no part. A reward that raises, or returns anything but such a list, is a ValueError in one line that names it.
"""

import importlib
import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from data.chat import Message


@dataclass(frozen=True)
class Answer:
    """One completion, as a reward sees it."""

    prompt: list[Message]
    text: str
    """The completion without special tokens."""
    ids: list[int]
    finished: bool
    """Whether it ended by itself; False where it was cut at the longest length allowed."""
    wanted: str
    """The answer in the data."""
    row: dict[str, Any]
    """The data's row; rows that were split into training and held-out ones have their messages only."""


Values = Sequence[float | None]


class Reward(NamedTuple):
    name: str
    """as given: regex:PATTERN"""
    weight: float
    function: Callable[[Sequence[Answer]], Values]


def make_rewards(specs: Sequence[str], weights: Sequence[float], *, max_completion_length: int) -> list[Reward]:
    """The rewards of these names; no weights: each weighs 1.

    Raises ValueError for no or an unknown name, a bad argument, or another number of weights than of rewards.
    """
    if not specs:
        raise ValueError(f"a reward is needed: {', '.join(BUILT_IN)} or module:function")
    if weights and len(weights) != len(specs):
        raise ValueError(f"{len(specs)} rewards need as many weights, got {len(weights)}")
    if len(set(specs)) < len(specs):
        raise ValueError(f"each reward may be given once, got {' '.join(specs)}")
    functions = [_function(spec, max_completion_length) for spec in specs]
    return [Reward(*parts) for parts in zip(specs, weights or [1.0] * len(specs), functions, strict=True)]


def score(rewards: Sequence[Reward], answers: Sequence[Answer]) -> tuple[list[float], dict[str, list[float | None]]]:
    """(Σ w_k r_k of each answer, NaN where no reward applies; each reward's own values by its name)."""
    values = {reward.name: _checked(reward, answers) for reward in rewards}
    totals = []
    for i in range(len(answers)):
        terms = [(reward.weight, values[reward.name][i]) for reward in rewards]
        applying = [weight * value for weight, value in terms if value is not None]
        totals.append(math.fsum(applying) if applying else math.nan)
    return totals, values


def _checked(reward: Reward, answers: Sequence[Answer]) -> list[float | None]:
    try:
        values = reward.function(answers)
    except Exception as error:  # it is the user's code: anything may come
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"reward {reward.name} raised {said}") from error
    try:
        found = [None if value is None else float(value) for value in values]
    except (TypeError, ValueError):
        raise ValueError(
            f"reward {reward.name} must return a list of numbers, one for each answer, got {type(values).__name__}"
        ) from None
    if len(found) != len(answers):
        raise ValueError(f"reward {reward.name} got {len(answers)} answers and returned {len(found)} numbers")
    for value in found:
        if value is not None and not math.isfinite(value):
            raise ValueError(f"reward {reward.name} returned {value}: a reward is a finite number, or None for none")
    return found


# Built in: text, wanted → number


def is_exact(text: str, wanted: str) -> float:
    return float(text.strip() == wanted.strip())


def is_number(text: str, wanted: str) -> float | None:
    """None where the wanted answer holds no number: that row has nothing to compare with."""
    right = final_number(wanted)
    return None if right is None else float(final_number(text) == right)


NUMBER = re.compile(r"(?:(?<![\d.])-)?\$?(\d[\d,]*(?:\.\d+)?|\.\d+)")


def final_number(text: str) -> Decimal | None:
    """GSM8K's answer: the first number after the last "####", else the last number of the text. None: there is none."""
    _, mark, after = text.rpartition("####")
    found = list(NUMBER.finditer(after if mark else text))
    if not found:
        return None
    number = found[0] if mark else found[-1]
    sign = -1 if number[0].startswith("-") else 1
    return sign * Decimal(number[1].replace(",", ""))


def is_json(text: str, _wanted: str) -> float:
    return float(_parse(text) is not _NOT_JSON)


def json_fields(text: str, wanted: str, fields: Sequence[str] = ()) -> float | None:
    """None where the wanted answer is no JSON object, or has none of the fields."""
    right, found = _parse(wanted), _parse(text)
    if not isinstance(right, dict):
        return None
    keys = [key for key in right if not fields or key in fields]
    if not keys:
        return None
    if not isinstance(found, dict):
        return 0.0
    same = [key in found and _spelled(found[key]) == _spelled(right[key]) for key in keys]
    return sum(same) / len(keys)


def matches(text: str, _wanted: str, *, pattern: re.Pattern[str]) -> float:
    return float(pattern.fullmatch(text.strip()) is not None)


# Built in: number of tokens → number


def near_length(length: int, *, target: int) -> float:
    return max(0.0, 1 - abs(length - target) / target)


def soft_overlong_punishment(length: int, *, longest: int, margin: int) -> float:
    """DAPO eq. 13: 0 for up to longest - margin tokens, falling to -1 at `longest` and beyond."""
    return max(-1.0, min(0.0, (longest - margin - length) / margin))


_NOT_JSON = object()


def _parse(text: str) -> object:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return _NOT_JSON


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _spelled(value: object) -> str:
    """One spelling per value: 3, 3.0, "3" and true differ."""
    return json.dumps(value, sort_keys=True)


# From a name to a function of answers


def _function(spec: str, longest: int) -> Callable[[Sequence[Answer]], Values]:
    name, colon, argument = spec.partition(":")
    if name not in BUILT_IN:
        return _users_own(spec)
    if name in ("exact", "number", "json") and colon:
        raise ValueError(f"reward {spec}: {name} takes nothing after a colon")
    return BUILT_IN[name](spec, argument, longest)


def _of_text(function: Callable[..., float | None], **fixed: Any) -> Callable[[Sequence[Answer]], Values]:
    return lambda answers: [function(a.text, a.wanted, **fixed) for a in answers]


def _of_length(function: Callable[..., float], **fixed: Any) -> Callable[[Sequence[Answer]], Values]:
    return lambda answers: [function(len(a.ids), **fixed) for a in answers]


def _regex(spec: str, argument: str, _: int) -> Callable[[Sequence[Answer]], Values]:
    try:
        return _of_text(matches, pattern=re.compile(argument, re.DOTALL))
    except re.error as error:
        raise ValueError(f"reward {spec}: the pattern does not compile: {error}") from None


def _count(spec: str, argument: str) -> int:
    if not argument.isdecimal() or int(argument) < 1:
        raise ValueError(f"reward {spec}: after the colon comes a number of tokens, at least 1, got {argument!r}")
    return int(argument)


def _overlong(spec: str, argument: str, longest: int) -> Callable[[Sequence[Answer]], Values]:
    margin = _count(spec, argument)
    if margin > longest:
        raise ValueError(f"reward {spec}: its margin must be at most the longest completion, {longest} tokens")
    return _of_length(soft_overlong_punishment, longest=longest, margin=margin)


BUILT_IN: dict[str, Callable[[str, str, int], Callable[[Sequence[Answer]], Values]]] = {
    "exact": lambda *_: _of_text(is_exact),
    "number": lambda *_: _of_text(is_number),
    "json": lambda *_: _of_text(is_json),
    "json_fields": lambda _, names, __: _of_text(json_fields, fields=names.split(",") if names else ()),
    "regex": _regex,
    "length": lambda spec, argument, _: _of_length(near_length, target=_count(spec, argument)),
    "overlong": _overlong,
}


def _users_own(spec: str) -> Callable[[Sequence[Answer]], Values]:
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ValueError(f"reward {spec!r} is none of {', '.join(BUILT_IN)}, and not module:function")
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else _from_module(place)
    except Exception as error:  # importing runs the user's code: anything may come
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"reward {spec}: {place} cannot be imported: {said}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward {spec}: {place} has no function {name}")
    return function


def _from_module(name: str) -> Any:
    """Found where Python finds modules, and last in the working directory."""
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(here)


def _from_file(path: Path) -> Any:
    found = importlib.util.spec_from_file_location(path.stem, path)
    if found is None or found.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module
