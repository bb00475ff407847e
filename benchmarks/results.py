"""Where benchmark rows go: benchmarks/results/NAME.csv, with what they were measured on, and a table on the screen."""

import csv
import io
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parent / "results"


def setting() -> dict[str, Any]:
    """The commit, machine and versions that every row carries."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=RESULTS.parent, check=False
    )
    return {
        "commit": git.stdout.strip() or "unknown",
        "machine": f"{_processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write_rows(name: str, rows: list[dict[str, Any]], *, key: str) -> Path:
    """Print rows and put them into results/name.csv in place of its rows with the same value of `key`."""
    path = RESULTS / f"{name}.csv"
    old = read_rows(path) if path.exists() else []
    replaced = {str(row[key]) for row in rows}
    new = [row | setting() for row in rows]
    kept = [row for row in old if row[key] not in replaced]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(new[0]), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows([*kept, *new])
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text.getvalue(), encoding="utf-8")
    os.replace(temporary, path)
    show(name, new)
    return path


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """The columns in which the rows differ as a table; what they share below it."""
    shared = {k: v for k, v in rows[0].items() if all(row[k] == v for row in rows)}
    differing = [k for k in rows[0] if k not in shared and k != "key"]  # the key repeats the others
    table = Table(*differing, title=title)
    for row in rows:
        table.add_row(*(str(row[k]) for k in differing))
    console = Console()
    console.print(table, markup=False)
    console.print(", ".join(f"{k} {v}" for k, v in shared.items()), markup=False, highlight=False)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
