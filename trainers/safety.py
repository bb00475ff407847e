"""What a run does when something comes between: SIGINT and SIGTERM finish the step and save it; a loss or a gradient
that is not finite is skipped, a few times.
"""

import math
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

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


class Skips:
    """Updates left out since loss or gradient norm was not finite. More than `allowed` in a row stop the run."""

    def __init__(self, allowed: int, total: int = 0, in_a_row: int = 0) -> None:
        self.allowed, self.total, self.in_a_row = allowed, total, in_a_row

    def is_good(self, loss: float, grad_norm: float) -> bool:
        """Whether to update. Raises ValueError when too many in a row were not."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = 0
            return True
        if self.in_a_row == self.allowed:
            after = f", after {self.in_a_row} updates skipped" if self.in_a_row else ""
            raise ValueError(
                f"training needs finite numbers: loss is {loss}, gradient norm {grad_norm}{after}; lower the rate"
            )
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        return False
