"""Typical wrong answers to the exercises, one file an exercise: exNN.py with a list WRONG."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Wrong:
    """An answer that is the solution but for these functions, and words of the hint that the first wrong case gives."""

    hint: str
    functions: dict[str, Callable[..., Any]]

    @property
    def __name__(self) -> str:
        return next(iter(self.functions.values())).__name__
