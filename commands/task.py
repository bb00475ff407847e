"""qlora task: write the rows of a task that comes with this repository, to train and to be judged on.

records      a customer's message becomes a JSON record (data/tasks.py), the demo's task
quantities   read a number out of a sentence (data/quantities.py), a task for rewards
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from data import quantities, tasks

TASKS: dict[str, tuple[tuple[str, ...], Callable[[str, int, int], list[dict[str, str]]]]] = {
    "records": (tasks.SPLITS, tasks.make_split),
    "quantities": (quantities.SPLITS, quantities.make_quantities),
}


@dataclass(frozen=True)
class TaskArgs:
    """Write the rows of a task, a file for each split."""

    name: tyro.conf.Positional[Literal["records", "quantities"]]
    """records: a message becomes JSON. quantities: read a number out of a sentence."""
    folder: tyro.conf.Positional[str]
    """where the files go, such as runs/quantities"""
    train_rows: int = 400
    """rows to train on"""
    held_out_rows: int = 64
    """rows of every other split"""
    seed: int = 0
    """which rows"""


def run(args: TaskArgs) -> None:
    """Raises ValueError for a number of rows below 1."""
    if args.train_rows < 1 or args.held_out_rows < 1:
        raise ValueError(f"--train-rows and --held-out-rows must be at least 1, got {args}")
    splits, make = TASKS[args.name]
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits:
        rows = make(split, args.train_rows if split == "train" else args.held_out_rows, args.seed)
        path = folder / f"{split}.jsonl"
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        os.replace(temporary, path)
        print(f"{path}: {len(rows)} rows, such as {json.dumps(rows[0], ensure_ascii=False)}")
