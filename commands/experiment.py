"""qlora experiment: run one of experiments/ in a process of its own; docs/experiments says what it shows."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
SHARED = {"__init__", "pages", "text", "small_model", "finetuning"}


@dataclass(frozen=True)
class ExperimentArgs:
    """Try a claim of the papers here. Flags of an experiment follow two dashes: experiment formats -- --quick."""

    name: tyro.conf.Positional[str]
    """A file of experiments/: formats, rank, memory_saving, …"""
    flags: tyro.conf.Positional[tuple[str, ...]] = ()
    """passed on to the experiment"""


def run(args: ExperimentArgs) -> None:
    """Raises ValueError for an unknown name, or when the experiment fails."""
    if args.name not in names():
        raise ValueError(f"no experiment {args.name!r}: there are {', '.join(names())}")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", f"experiments.{args.name}", *args.flags]
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode == 2:  # it said what is wrong, as argparse does
        raise SystemExit(2)
    if done.returncode:
        raise ValueError(f"experiment {args.name} ended with exit code {done.returncode}")


def names() -> list[str]:
    """The experiments there are."""
    return sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem not in SHARED)
