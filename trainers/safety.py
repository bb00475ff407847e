"""What a run does when something comes between: SIGINT and SIGTERM finish the step and save it; a loss or a gradient
that is not finite is skipped, a few times; a file that cannot be written is named.
"""

import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors import SafetensorError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop has stopped, with a checkpoint. Its text says how to go on."""


class StopSignals:
    """Until `restore`, the first SIGINT or SIGTERM only sets `asked`; the second acts as it always does."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        self.restore()

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def interrupted(self, command: str, out: str | Path, step: int) -> Interrupted:
        """The error that ends the run: `qlora {command}` goes on with it."""
        return Interrupted(
            f"stopped by {self.asked or 'a signal to another rank'} after step {step}, which is saved; go on with: "
            f"qlora {command} --config {Path(out) / 'config.json'} --resume"
        )


@contextmanager
def writing(path: Path, then: str = "") -> Iterator[None]:
    """Raises OSError that names `path`, and says what then, where the system's error says only why."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else None
        reason = os.strerror(number) if number else str(error)
        raise OSError(f"{path} could not be written: {reason}{then}") from None


def write_aside(path: Path, text: str) -> None:
    """Write a file beside `path` and rename it into place; after an error nothing of it is left. Raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Diverged(ValueError):
    """Too many updates in a row were not finite."""


class Skips:
    """Updates left out since loss or gradient norm was not finite. More than `allowed` in a row stop the run."""

    def __init__(self, allowed: int, total: int = 0, in_a_row: int = 0) -> None:
        self.allowed, self.total, self.in_a_row = allowed, total, in_a_row

    def is_good(self, loss: float, grad_norm: float) -> bool:
        """Whether to update. Raises Diverged when too many in a row were not."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = 0
            return True
        if self.in_a_row == self.allowed:
            after = f", after {self.in_a_row} updates skipped" if self.in_a_row else ""
            raise Diverged(
                f"training needs finite numbers: loss is {loss}, gradient norm {grad_norm}{after}; lower the rate"
            )
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        return False
