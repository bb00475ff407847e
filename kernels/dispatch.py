"""The one place that chooses who runs an operation: reference | triton | cpu.

`auto` follows the tensor's device (triton on a GPU, the C kernels on a CPU) and falls back to the reference where the
preferred backend has no kernel. A backend asked for by name, with `use_backend` or QLORA_BACKEND, never falls back.
An operation is a plain function registered under its name and backend; differentiable ones register forward and
backward apart, and their autograd.Function keeps the backend of the forward for its backward.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch

BACKENDS = ("reference", "triton", "cpu")
CHOICES = (*BACKENDS, "auto")

_asked: ContextVar[str | None] = ContextVar("backend", default=None)
_implementations: dict[tuple[str, str], Callable[..., Any]] = {}


def register(operation: str, backend: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: this function runs `operation` on `backend`."""

    def keep(function: Callable[..., Any]) -> Callable[..., Any]:
        _implementations[operation, backend] = function
        return function

    return keep


def asked_backend() -> str:
    """What `use_backend` or QLORA_BACKEND asks for now, "auto" when neither does. Raises ValueError if unknown."""
    return _asked.get() or _checked(os.environ.get("QLORA_BACKEND") or "auto", "QLORA_BACKEND")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Inside, every operation runs on `name` (reference, triton, cpu or auto). Raises ValueError for another name."""
    token = _asked.set(_checked(name))
    try:
        yield
    finally:
        _asked.reset(token)


def captured_backend() -> Callable[[], AbstractContextManager[None]]:
    """Today's choice, to be entered again later: what a checkpoint's recomputation in backward needs."""
    name = asked_backend()
    return lambda: use_backend(name)


def backend_for(operation: str, device: torch.device) -> str:
    """The backend that runs `operation` on tensors of `device` now.

    Raises ValueError when a backend was asked for by name and cannot run it.
    """
    name = asked_backend()
    if name == "auto":
        preferred = _preferred(device)
        return preferred if (operation, preferred) in _implementations else "reference"
    if (operation, name) not in _implementations:
        raise ValueError(f"backend {name!r} was asked for and cannot run {operation}: {_why_missing(name)}")
    return name


def implementation(operation: str, backend: str) -> Callable[..., Any]:
    """The function registered for `operation` on `backend`."""
    return _implementations[operation, backend]


def describe_backends() -> dict[str, str]:
    """Each backend, with the operations it runs or the reason why it runs none; "auto" says what it picks."""
    rows = {}
    for backend in BACKENDS:
        operations = sorted(op for op, b in _implementations if b == backend)
        rows[backend] = ", ".join(operations) or _why_missing(backend)
    rows["auto"] = "triton on a GPU, cpu on a CPU, reference where those have no kernel"
    return rows


def _preferred(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "triton"


def _why_missing(backend: str) -> str:
    return f"no {backend} kernel is part of this version"


def _checked(name: str, what: str = "backend") -> str:
    if name not in CHOICES:
        raise ValueError(f"{what} must be one of {', '.join(CHOICES)}, got {name!r}")
    return name
