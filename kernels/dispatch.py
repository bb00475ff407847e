"""The one place that chooses who runs an operation: reference | triton | cpu.

`auto` follows the tensor's device (triton on a GPU, the C kernels on a CPU) and falls back to the reference where the
preferred backend has no kernel. A backend asked for by name, with `use_backend` or QLORA_BACKEND, never falls back.
An operation is a plain function registered under its name and backend; differentiable ones register forward and
backward apart, and their autograd.Function keeps the backend of the forward for its backward. A backend may say that
this machine cannot run it (`register_backend`), an operation that it cannot serve a call (`unless`): `auto` then says
so once, in the log "qlora", and takes the reference.
"""

import logging
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
_refusals: dict[tuple[str, str], Callable[..., str | None]] = {}
_missing: dict[str, Callable[[], str | None]] = {}
_details: dict[str, Callable[[], str]] = {}
_said: set[str] = set()


def register(
    operation: str, backend: str, unless: Callable[..., str | None] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: this function runs `operation` on `backend`. unless(*call): why it cannot serve a call, or None."""

    def keep(function: Callable[..., Any]) -> Callable[..., Any]:
        _implementations[operation, backend] = function
        if unless is not None:
            _refusals[operation, backend] = unless
        return function

    return keep


def register_backend(backend: str, why_missing: Callable[[], str | None], detail: Callable[[], str]) -> None:
    """why_missing(): why this machine cannot run `backend`, or None. detail(): what describe_backends adds."""
    _missing[backend], _details[backend] = why_missing, detail


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


def backend_for(operation: str, device: torch.device, *call: Any) -> str:
    """The backend that runs `operation` on tensors of `device` now. `call` holds its arguments, where that may matter.

    Raises ValueError when a backend was asked for by name and cannot run it.
    """
    name = asked_backend()
    if name == "auto":
        preferred = _preferred(device)
        if (operation, preferred) not in _implementations:
            return "reference"
        reason = _why_not(operation, preferred, call)
        if reason is None:
            return preferred
        say_once(f"the reference backend serves where {preferred} would be faster: {reason}")
        return "reference"
    reason = _why_not(operation, name, call)
    if reason is not None:
        raise ValueError(f"backend {name!r} was asked for and cannot run {operation}: {reason}")
    return name


def implementation(operation: str, backend: str) -> Callable[..., Any]:
    """The function registered for `operation` on `backend`."""
    return _implementations[operation, backend]


def describe_backends() -> dict[str, str]:
    """Each backend, with the operations it runs or the reason why it runs none; "auto" says what it picks."""
    rows = {}
    for backend in BACKENDS:
        operations = sorted(op for op, b in _implementations if b == backend)
        missing = _why_missing(backend)
        detail = f"{_details[backend]()}: " if backend in _details and not missing else ""
        rows[backend] = missing or detail + ", ".join(operations)
    rows["auto"] = "triton on a GPU, cpu on a CPU, reference where those have no kernel"
    return rows


def _preferred(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "triton"


def _why_missing(backend: str) -> str | None:
    if not any(b == backend for _, b in _implementations):
        return f"no {backend} kernel is part of this version"
    return _missing[backend]() if backend in _missing else None


def _why_not(operation: str, backend: str, call: tuple[Any, ...]) -> str | None:
    """Why `backend` cannot serve this call of `operation`, or None."""
    if (operation, backend) not in _implementations:
        return _why_missing(backend) or f"it has no kernel for {operation}"
    reason = _missing[backend]() if backend in _missing else None
    if reason is None and call and (operation, backend) in _refusals:
        reason = _refusals[operation, backend](*call)
    return reason


def say_once(notice: str) -> None:
    """A line in the log "qlora", the first time only."""
    if notice not in _said:
        _said.add(notice)
        logging.getLogger("qlora").warning(notice)


def _checked(name: str, what: str = "backend") -> str:
    if name not in CHOICES:
        raise ValueError(f"{what} must be one of {', '.join(CHOICES)}, got {name!r}")
    return name
