"""A case of an exercise: a call, the value it must give, and what typical mistakes would give instead.

A mistake is recognised by its result: a check computes what the wrong formula gives on the same input. Where an answer
equals that and not the right value, its hint is the precise one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Student = Callable[..., Any]
"""student("function_name", *arguments) → what the student's function returns. Arguments are copied."""


@dataclass(frozen=True)
class Mistake:
    """A typical wrong answer to a case."""

    hint: str
    """one or two sentences: what was done, and what to do"""
    value: Any
    """what this mistake gives where the case has `expected`; or, where that is no one value, answer → bool"""

    def shows(self, got: Any, rtol: float, atol: float) -> bool:
        """Is this the mistake behind a wrong answer?"""
        if not callable(self.value):
            return difference(got, self.value, rtol, atol) is None
        try:
            return bool(self.value(got))
        except Exception:  # an answer of another form than the function expects
            return False


@dataclass(frozen=True)
class Forbidden:
    """A name that an answer must not use."""

    name: str
    """an imported module ("quant") or, with a dot before it, an attribute (".bfloat16")"""
    hint: str


@dataclass(frozen=True)
class Case:
    """One call, or several where `ask` makes them."""

    name: str
    ask: Callable[[Student], Any]
    """lambda student: student("quantize_nf4", weight): the value that is compared"""
    expected: Any
    """numbers, tensors, or tuples, lists and dicts of them"""
    mistakes: Sequence[Mistake] = ()
    rtol: float = 0.0
    atol: float = 0.0
    """floating point values may differ by atol + rtol · |expected|; both 0: equal to the bit (but 0 = -0)"""
    rule: Callable[[Any], str | None] | None = None
    """what else must hold of the value: a complaint, or None. Asked once the value is as expected."""


def verdict(case: Case, got: Any) -> str | None:
    """None if `got` is right, or what is wrong with it, with the hint of the mistake that it shows."""
    wrong = difference(got, case.expected, case.rtol, case.atol)
    if wrong is None:
        return case.rule(got) if case.rule else None
    for mistake in case.mistakes:
        if mistake.shows(got, case.rtol, case.atol):
            return f"{wrong}. Perhaps: {mistake.hint}"
    return wrong


def difference(got: Any, expected: Any, rtol: float = 0.0, atol: float = 0.0, where: str = "the answer") -> str | None:
    """The first way in which `got` is not `expected`, in words, or None."""
    if isinstance(expected, Tensor):
        return _tensor_difference(got, expected, rtol, atol, where)
    if isinstance(expected, tuple | list):
        if not isinstance(got, tuple | list) or len(got) != len(expected):
            return f"{where} must be {len(expected)} values, got {_kind(got)}"
        pairs = enumerate(zip(got, expected, strict=True))
        found = (difference(g, e, rtol, atol, f"{where}[{i}]") for i, (g, e) in pairs)
        return next((text for text in found if text), None)
    if isinstance(expected, dict):
        if not isinstance(got, dict) or got.keys() != expected.keys():
            return f"{where} must be a dict of {', '.join(map(str, expected))}, got {_kind(got)}"
        found = (difference(got[key], e, rtol, atol, f"{where}[{key!r}]") for key, e in expected.items())
        return next((text for text in found if text), None)
    if isinstance(expected, float) and not isinstance(expected, bool):
        if not isinstance(got, float | int) or isinstance(got, bool):
            return f"{where} must be a number, got {_kind(got)}"
        same = got == expected or (math.isnan(got) and math.isnan(expected))
        return None if same or abs(got - expected) <= atol + rtol * abs(expected) else _say(where, got, expected)
    return None if type(got) is type(expected) and got == expected else _say(where, got, expected)


def _tensor_difference(got: Any, expected: Tensor, rtol: float, atol: float, where: str) -> str | None:
    if not isinstance(got, Tensor):
        return f"{where} must be a tensor, got {_kind(got)}"
    if got.shape != expected.shape:
        return f"{where} must have shape {tuple(expected.shape)}, got {tuple(got.shape)}"
    if got.dtype != expected.dtype:
        return f"{where} must be {expected.dtype}, got {got.dtype}"
    wide = torch.float64 if expected.is_floating_point() else torch.int64
    g, e = got.detach().to(wide).reshape(-1), expected.detach().to(wide).reshape(-1)
    same = (g == e) | ((g - e).abs() <= atol + rtol * e.abs())
    if expected.is_floating_point():
        same |= g.isnan() & e.isnan()
    if same.all():
        return None
    first = int((~same).nonzero()[0])
    index = [int(i) for i in torch.unravel_index(torch.tensor(first), expected.shape)] if expected.dim() else ""
    text = _say(f"{where}{index}", g[first].item(), e[first].item())
    return text if expected.numel() == 1 else f"{text}; {int((~same).sum())} of {same.numel()} are wrong"


def _say(where: str, got: Any, expected: Any) -> str:
    """With as many digits as it takes to see that they differ."""
    if isinstance(got, float) and isinstance(expected, float):
        short = f"{where} is {got:.6g}, expected {expected:.6g}"
        return short if f"{got:.6g}" != f"{expected:.6g}" else f"{where} is {got!r}, expected {expected!r}"
    return f"{where} is {_kind(got) if type(got) is not type(expected) else repr(got)[:80]}, expected {expected!r:.80}"


def _kind(value: Any) -> str:
    if value is None:
        return "None: is a return missing?"
    if isinstance(value, tuple | list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{type(value).__name__} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.60}"
