"""Runs killed by SIGKILL at random moments, resumed, and compared with a run that nobody disturbed, byte for byte.

    python tests/kill_runs.py --runs 20                 each killed once: in training, in evaluation, in a checkpoint

A child process trains a tiny model, and keeps its phase and how often it was in each in a small file that both
processes map. Kills take the phases in turn: wait until the phase has begun a random number of times, then a random
part of what it took last, kill, and read from the file where the child was hit. Every step trains, evaluates and saves
a checkpoint; the optimizer is paged_adamw_8bit with nothing resident.
"""

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.small_base import write_base, write_rows  # noqa: E402  # after the path
from trainers import optimizers, run, sft  # noqa: E402

PHASES = ("training", "evaluation", "checkpoint")
WHERE = struct.Struct("4I3d")  # phase + 1, or 0 between phases; how often each began; seconds each took last
STEPS = 24
PAGE_BYTES = 8192  # so that the tiny model needs several


def tiny_run(folder: Path) -> sft.SFTConfig:
    """The run that is killed, its model and its rows in `folder`."""
    return sft.SFTConfig(
        data=str(write_rows(folder / "rows.jsonl")), eval_data=str(folder / "rows.jsonl"), out=str(folder / "run"),
        model=str(write_base(folder / "base")), method="full", dropout=0.1, max_steps=STEPS, batch_size=2,
        accumulation=1, learning_rate=5e-3, samples=0, threads=1, save_every=1, eval_every=1,
        optimizer="paged_adamw_8bit", optimizer_budget=0,
    )  # fmt: skip


def result_bytes(out: Path | str) -> bytes:
    """What a run is for: the trained weights."""
    (file,) = [*Path(out).glob("model/*.safetensors"), *Path(out).glob("adapter/*.safetensors")]
    return file.read_bytes()


class Child:
    """A training process, and the phase it is in."""

    def __init__(self, config: sft.SFTConfig, mark: Path) -> None:
        mark.write_bytes(bytes(WHERE.size))
        with open(mark, "r+b") as file:
            self.mark = mmap.mmap(file.fileno(), WHERE.size)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, __file__, "--child", json.dumps(asdict(config)), str(mark)]
        self.process = subprocess.Popen(command, env=environment)

    def kill_in(self, phase: str, times: int, rng: random.Random) -> str:
        """Kill while `phase` is under way for the times-th time. Returns where the child really was."""
        number = PHASES.index(phase)
        while self.process.poll() is None and self._begun(number) < times:
            time.sleep(0.0002)
        time.sleep(rng.random() * WHERE.unpack(self.mark[:])[4 + number])
        self.process.send_signal(signal.SIGKILL)
        if self.process.wait() != -signal.SIGKILL:
            raise RuntimeError(f"the run ended, with exit code {self.process.returncode}, before it was killed")
        hit = WHERE.unpack(self.mark[:])[0]
        return PHASES[hit - 1] if hit else "between"

    def _begun(self, number: int) -> int:
        return WHERE.unpack(self.mark[:])[1 + number]


def train_marked(config: sft.SFTConfig, mark: Path) -> None:
    """What a child does: train, and keep the file up to date."""
    with open(mark, "r+b") as file:
        shared = mmap.mmap(file.fileno(), WHERE.size)

    def marking(function: Callable[..., Any], number: int) -> Callable[..., Any]:
        def marked(*arguments: Any, **options: Any) -> Any:
            _, *values = WHERE.unpack(shared[:])
            values[number] += 1
            shared[:] = WHERE.pack(number + 1, *values)
            start = time.perf_counter()
            result = function(*arguments, **options)
            values[len(PHASES) + number] = time.perf_counter() - start
            shared[:] = WHERE.pack(0, *values)
            return result

        return marked

    optimizers.PAGE_BYTES = PAGE_BYTES
    sft.train_step = marking(sft.train_step, 0)
    sft.evaluate_loss = marking(sft.evaluate_loss, 1)
    run.save_checkpoint = marking(run.save_checkpoint, 2)
    sft.train(config, quiet=True)


def kill_and_resume(config: sft.SFTConfig, phases: Sequence[str], rng: random.Random, mark: Path) -> list[str]:
    """A run killed once in each of these phases, one after the other, and then left alone. Returns where it was hit.

    Raises RuntimeError when it ended before a kill, or did not end well after the last.
    """
    hits = []
    for phase in phases:
        child = Child(config, mark)
        hits.append(child.kill_in(phase, rng.randint(1, STEPS // len(phases) - 2), rng))
        config = replace(config, resume=(Path(config.out) / "config.json").exists())
    last = Child(config, mark)
    if last.process.wait() != 0:
        raise RuntimeError(f"the resumed run ended with exit code {last.process.returncode}")
    return hits


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--runs", type=int, default=20)
    flags.add_argument("--kills", type=int, default=1, help="of each run")
    flags.add_argument("--seed", type=int, default=0)
    args = flags.parse_args()
    rng, where, different = random.Random(args.seed), Counter[str](), 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = tiny_run(folder)
        whole = Child(replace(config, out=str(folder / "whole")), folder / "mark")
        if whole.process.wait() != 0:
            return 1
        wanted = result_bytes(folder / "whole")
        for number in range(args.runs):
            phases = [PHASES[(number * args.kills + kill) % len(PHASES)] for kill in range(args.kills)]
            hits = kill_and_resume(config, phases, rng, folder / "mark")
            same = result_bytes(config.out) == wanted
            different += not same
            where.update(hits)
            print(
                f"run {number + 1}: killed in {', '.join(hits)}: {'the same bytes' if same else 'OTHER BYTES'}",
                flush=True,
            )
            shutil.rmtree(config.out)
    print(f"{args.runs} runs, {args.runs - different} with the bytes of the undisturbed one; kills: {dict(where)}")
    return 1 if different else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        train_marked(sft.SFTConfig(**json.loads(sys.argv[2])), Path(sys.argv[3]))
    else:
        sys.exit(main())
