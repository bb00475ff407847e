"""What a run shows and keeps: metrics.jsonl, a progress bar (plain lines when not on a terminal), curves."""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .safety import write_aside

PLAIN_LINES = 20  # how many lines a whole run prints when there is no terminal


def peak_memory_bytes() -> int:
    """The most memory used so far: peak allocated on a GPU, peak resident size of the process otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def page_faults() -> dict[str, int]:
    """What the system did to this process so far: minor faults found the page in memory, major ones read a disk."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {"minor": usage.ru_minflt, "major": usage.ru_majflt}


class MetricsFile:
    """metrics.jsonl: one JSON object a line, in order of step."""

    def __init__(self, path: Path, resume_after: int | None = None, *, write: bool = True) -> None:
        """Start anew, or, resuming, keep only the lines up to step `resume_after`. write=False: do nothing."""
        self.path, self.writes = path, write
        kept = [] if resume_after is None else [row for row in read_metrics(path) if row["step"] <= resume_after]
        self.last: dict[str, Any] = kept[-1] if kept else {}
        if not write:
            return
        write_aside(path, "".join(json.dumps(row) + "\n" for row in kept))

    def append(self, **row: Any) -> None:
        """A number that is not finite becomes null: JSON has no NaN."""
        if not self.writes:
            return
        row = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, up to a line that is none: a kill or a full disk may have cut it short."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows


class Speed:
    """Tokens a second and seconds trained, the pauses for evaluation and saving left out."""

    def __init__(self, seconds: float = 0.0, tokens: int = 0) -> None:
        self.seconds, self.tokens = seconds, tokens

    @contextmanager
    def measured(self, tokens: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start
        self.tokens += tokens

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class ProgressLine:
    """A bar with loss, rate, tokens/s, peak memory and time left; without a terminal, some plain lines."""

    def __init__(self, total_steps: int, done: int, *, quiet: bool = False) -> None:
        self.total, self.first, self.start, self.quiet = total_steps, done, time.perf_counter(), quiet
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        if self.console.is_terminal and not quiet:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("", total=total_steps, completed=done)
            self.bar.start()

    def update(self, step: int, *, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        memory = peak_memory_bytes() / 1e9
        text = f"loss {loss:.4f}  lr {learning_rate:.2e}  {tokens_per_second:,.0f} tokens/s  {memory:.2f} GB peak"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=text)
        elif not self.quiet and (step % max(1, self.total // PLAIN_LINES) == 0 or step in (1, self.total)):
            left = (time.perf_counter() - self.start) / max(1, step - self.first) * (self.total - step)
            print(f"step {step}/{self.total}  {text}  {left:.0f} s left", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if not self.quiet:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def plot_curves(rows: list[dict[str, Any]], path: Path, curves: Mapping[str, str], ylabel: str) -> bool:
    """Some numbers of metrics.jsonl over the steps, as a PNG; curves: {key of the row: label}.

    A key that no row has draws nothing. False where matplotlib (extra `plot`) is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label in curves.items():
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 15 else None)
    axes.set(xlabel="optimizer step", ylabel=ylabel)
    axes.legend()
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        figure.savefig(temporary, dpi=120, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return True
