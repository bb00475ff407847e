"""qlora bench: run a benchmark of benchmarks/ in a process of its own, or say which backends run here."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

import kernels

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@dataclass(frozen=True)
class BenchArgs:
    """Measure. `qlora bench backends` says which kernels run; flags of a benchmark follow two dashes: bench matmul --
    --rounds 5."""

    name: tyro.conf.Positional[str]
    """backends, or a benchmark: the part after bench_ of a file in benchmarks/"""
    flags: tyro.conf.Positional[tuple[str, ...]] = ()
    """passed on to the benchmark"""


def run(args: BenchArgs) -> None:
    """Raises ValueError for an unknown name, or when the benchmark fails."""
    if args.name == "backends":
        for backend, text in kernels.describe_backends().items():
            print(f"{backend:10} {text}")
        return
    if args.name not in names():
        raise ValueError(f"no benchmark {args.name!r}: there are backends, {', '.join(names())}")
    script = FOLDER / f"bench_{args.name}.py"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, str(script), *args.flags], env=environment, check=False)
    if done.returncode == 2:  # it said what is wrong, as argparse does
        raise SystemExit(2)
    if done.returncode:
        raise ValueError(f"benchmark {args.name} ended with exit code {done.returncode}")


def names() -> list[str]:
    return sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
