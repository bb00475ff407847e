"""A run's folder, and whether an old one may be continued.

runs/NAME/
  config.json      the flags; the environment: backend, threads, versions, hash of the data; the recipe's warnings
  metrics.jsonl    one line a step
  checkpoints/     step-N, enough to resume to the same bits
  adapter/ | model/    the result, in PEFT's or transformers' format
  samples.jsonl  plots/
"""

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from kernels.dispatch import asked_backend

from . import world
from .metrics import read_metrics

RESUMABLE = {"out", "resume", "save_every", "keep_checkpoints", "samples", "optimizer_budget", "optimizer_spill"}
"""Flags that may change between a run and its continuation: they do not touch a bit of the result."""


def environment(data_hash: str) -> dict[str, Any]:
    """What must be the same for a resumed run to give the same bits."""
    return {
        "data_sha256": data_hash,
        "backend": asked_backend(),
        "threads": torch.get_num_threads(),
        "world_size": world.world_size(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def rows_hash(rows: list[dict[str, Any]]) -> str:
    """sha256 of a dataset's rows: a changed file is noticed wherever it lies."""
    return hashlib.sha256(json.dumps(rows, ensure_ascii=True, sort_keys=True, default=str).encode()).hexdigest()


def check(out: Path, config: dict[str, Any], env: dict[str, Any], *, resume: bool) -> None:
    """Whether a run may write here: a new one nowhere near an old one, a resumed one as it was. Writes nothing.

    Raises ValueError when the folder holds a run and resume is not asked for, when there is nothing to resume, or,
    naming the field, when a flag or the environment differs from the run's.
    """
    path = out / "config.json"
    if resume:
        _check_same(_read(path), {"config": config, "environment": env}, path)
        return
    if path.exists():
        raise ValueError(f"{out} holds a run already: pass --resume to go on with it, or another --out")


def create(out: Path, config: dict[str, Any], env: dict[str, Any], warnings: list[str]) -> None:
    """Make the folder and its config.json: once the data and the model are known to be good."""
    world.wait_for_all()  # a rank that is still in `check` must not find this run and take it for an old one
    if world.is_main():
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "config.json", {"config": config, "environment": env, "warnings": warnings})


def last_row_if_finished(out: Path, total_steps: int) -> dict[str, Any] | None:
    """The last row of metrics.jsonl, where that is of the last step and the result is saved."""
    rows = read_metrics(out / "metrics.jsonl")
    saved = (out / "adapter").is_dir() or (out / "model").is_dir()
    return rows[-1] if saved and rows and rows[-1]["step"] == total_steps else None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file aside and rename it into place."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"--resume needs a run to go on with, and {path.parent} holds none")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a JSON file: {error}") from None


def _check_same(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    for part, fields in now.items():
        for field, value in json.loads(json.dumps(fields)).items():
            was = before.get(part, {}).get(field)
            if field not in RESUMABLE and was != value:
                raise ValueError(f"a resumed run must be as it was: {path} has {field} {was!r}, now it is {value!r}")
