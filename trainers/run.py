"""A run between its first step and its last: what is counted, shown, kept, and where it goes on after a stop.

    with Run(flags, env, warned, parameters, optimizer, total_steps) as run:
        for step in run.steps_left():
            with run.speed.measured(tokens):
                loss, grad_norm = train_step(..., skips=run.skips)
            run.end_step(step, loss, grad_norm, rate, eval_loss=...)

The loop stays the trainer's own. `end_step` writes the step's row, moves the progress bar, saves a checkpoint where one
is due, and stops the run where a signal asked for it.
"""

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lora import count_parameters
from models import Decoder, Tokenizer
from optim import SpillError

from . import run_folder, world
from .checkpoint import all_checkpoints, load_checkpoint, read_buffer, rng_states, save_checkpoint, set_rng_states
from .flags import TrainerFlags
from .metrics import MetricsFile, ProgressLine, Speed, page_faults, peak_memory_bytes
from .optimizers import paging
from .prepare import load_trained
from .safety import Diverged, Skips, StopSignals, writing


@dataclass(frozen=True)
class RunResult:
    """What a run ended with."""

    out: str
    steps: int
    loss: float
    """Of the last step's window."""
    eval_loss: float | None
    seconds: float
    """In optimizer steps, over all sessions of the run."""
    tokens_per_second: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Trained:
    """A finished run: the model as it is in memory, and how it went."""

    model: Decoder
    tokenizer: Tokenizer
    result: RunResult


class Run:
    """A new run in its own folder, or, with --resume, an old one at its last checkpoint."""

    def __init__(
        self,
        flags: TrainerFlags,
        env: Mapping[str, Any],
        warned: Sequence[str],
        parameters: Sequence[tuple[str, nn.Parameter]],
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        *,
        quiet: bool = False,
    ) -> None:
        """env: of run_folder.environment. warned: the recipe's warnings, which config.json keeps.

        Writes the folder of a new run. Resuming puts parameters, optimizer, counters, torch's RNG and `buffer` back.
        Raises ValueError for a checkpoint that is damaged or does not fit.
        """
        self.flags, self.out, self.total_steps = flags, Path(flags.out), total_steps
        self.parameters, self.optimizer, self.warned = parameters, optimizer, list(warned)
        if not flags.resume:
            run_folder.create(self.out, asdict(flags), dict(env), self.warned)
        self.done, self.speed, self.skips = 0, Speed(), Skips(flags.max_skipped)
        self.buffer: dict[str, Tensor] = {}
        """What the trainer gave `end_step` to keep, as the checkpoint had it."""
        if flags.resume and world.is_main():
            run_folder.clear_unfinished(self.out)
        if flags.resume and (found := all_checkpoints(self.out / "checkpoints")):
            self.done, counters = _load_last(found, parameters, optimizer)
            self.buffer = read_buffer(found[-1])
            self.speed = Speed(counters["seconds"], counters["tokens"])
            self.skips = Skips(flags.max_skipped, counters["skipped"], counters["skipped_in_a_row"])
        resume_after = self.done if flags.resume else None
        self.metrics = MetricsFile(self.out / "metrics.jsonl", resume_after, write=world.is_main())
        self.loss, self.eval_loss = number(self.metrics.last.get("loss")), self.metrics.last.get("eval_loss")
        self.progress = ProgressLine(total_steps, self.done, quiet=quiet or not world.is_main())
        self._stop = StopSignals()
        self._good: tuple[int, Mapping[str, Tensor], Mapping[str, Tensor]] | None = None
        """The last step that went well: its number, buffer and torch's generators after it."""

    def __enter__(self) -> "Run":
        gc.collect()
        gc.freeze()  # libraries and model: looking through them again and again took 3 % of a step
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        gc.unfreeze()
        self._stop.restore()
        self.progress.close()
        if isinstance(error, SpillError):
            raise SpillError(error.errno, f"{error.strerror}; {go_on(self.flags.TRAINER, self.out)}") from None
        if isinstance(error, Diverged) and world.is_main() and self._good is not None:
            step, buffer, rng = self._good
            set_rng_states(rng)
            self._save(step, buffer)
            raise Diverged(f"{error}; step {step}, the last good state, is in {self.out / 'checkpoints'}") from None

    def introduce(self, model: Decoder, *lines: str) -> None:
        """Say how much of the model trains, then the lines, then the recipe's warnings."""
        trainable, total = count_parameters(model)
        flags = self.flags
        parts = f"{trainable:,} of {total:,} parameters train"
        self.progress.say(f"{flags.model}, {flags.method}: {parts}, seed {flags.seed}")
        for line in (*lines, *(f"warning: {text}" for text in self.warned)):
            self.progress.say(line)

    def steps_left(self) -> Iterator[int]:
        """Numbers of the steps to come, from 0."""
        for step in range(self.done, self.total_steps):
            world.seed_rank(self.flags.seed, step)
            yield step

    def evaluation_is_due(self, step: int) -> bool:
        """After step `step`: every --eval-every steps, and at the end."""
        every, now = self.flags.eval_every, step + 1
        return now == self.total_steps or bool(every and now % every == 0)

    def end_step(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        rate: float,
        *,
        buffer: Mapping[str, Tensor] | None = None,
        note: str = "",
        **more: Any,
    ) -> None:
        """Step `step` (from 0) ended. `more` joins its row in metrics.jsonl, `buffer` its checkpoint, `note` its line.

        Raises Interrupted, with the step saved, when a signal asked the run to stop.
        """
        now, speed = step + 1, self.speed
        row: dict[str, Any] = {"step": now, "loss": loss, "grad_norm": grad_norm, "learning_rate": rate} | more
        row |= {"tokens": speed.tokens, "seconds": round(speed.seconds, 3)}
        row |= {"tokens_per_second": round(speed.tokens_per_second, 1), "peak_memory_bytes": peak_memory_bytes()}
        row |= {"page_faults": page_faults(), "skipped": self.skips.total} | paging(self.optimizer)
        self.loss, self.eval_loss = loss, more.get("eval_loss", self.eval_loss)
        self.progress.update(now, loss=loss, learning_rate=rate, tokens_per_second=speed.tokens_per_second, note=note)
        with writing(self.metrics.path, f"; {go_on(self.flags.TRAINER, self.out)}"):
            self.metrics.append(**row)
        self._good = (now, buffer or {}, rng_states())
        every = self.flags.save_every
        stopping = world.any_in_world(self._stop.asked is not None) and now < self.total_steps
        if world.is_main() and (stopping or (every and now % every == 0)):
            self._save(now, buffer or {})
        if stopping:
            raise self._stop.interrupted(self.flags.TRAINER, self.out, now)

    def _save(self, step: int, buffer: Mapping[str, Tensor]) -> None:
        counters = {"seconds": self.speed.seconds, "tokens": self.speed.tokens}
        counters |= {"skipped": self.skips.total, "skipped_in_a_row": self.skips.in_a_row}
        folder, keep = self.out / "checkpoints", self.flags.keep_checkpoints
        with writing(folder / f"step-{step:06d}", f"; {go_on(self.flags.TRAINER, self.out)}"):
            save_checkpoint(folder, step, self.parameters, self.optimizer, counters, keep, buffer=buffer)

    def result(self) -> RunResult:
        """How the run went, after its last step."""
        measured = (self.speed.seconds, self.speed.tokens_per_second, peak_memory_bytes())
        return RunResult(self.flags.out, self.total_steps, self.loss, self.eval_loss, *measured)


def _load_last(
    found: Sequence[Path], parameters: Sequence[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, Any]]:
    """load_checkpoint of the last; where it fails, its error says which one is before it."""
    try:
        return load_checkpoint(found[-1], parameters, optimizer)
    except ValueError as error:
        before = f"; delete {found[-1]} to go on from {found[-2].name}" if len(found) > 1 else ""
        raise ValueError(f"{error}{before}") from None


def go_on(command: str, out: Path) -> str:
    """What a user can do after an error: how to go on, and from where."""
    found = all_checkpoints(out / "checkpoints")
    if not found:
        return "no checkpoint was saved before it (--save-every)"
    return f"{found[-1].name} is whole; go on with: qlora {command} --config {out / 'config.json'} --resume"


def finished(flags: TrainerFlags, tokenizer: Tokenizer, last_row: Mapping[str, Any], *, quiet: bool = False) -> Trained:
    """A run that needs no more training, as its folder has it. last_row: of run_folder.last_row_if_finished."""
    step, loss = last_row["step"], number(last_row["loss"])
    model = load_trained(flags)
    progress = ProgressLine(step, step, quiet=quiet or not world.is_main())
    progress.say(f"{flags.out} is finished already: {step} steps, the last with loss {loss:.4f}; nothing was trained")
    progress.close()
    measured = (last_row[key] for key in ("seconds", "tokens_per_second", "peak_memory_bytes"))
    return Trained(model, tokenizer, RunResult(flags.out, step, loss, last_row.get("eval_loss"), *measured))


def number(value: float | None) -> float:
    """metrics.jsonl has null for a number that was not finite."""
    return math.nan if value is None else value
