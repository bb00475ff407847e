"""A run's folder, and whether an old one may be continued.

runs/NAME/
  config.json      the flags; the environment: backend, threads, versions, hash of the data; fingerprints of the model's
                   files; the recipe's warnings
  metrics.jsonl    one line a step
  checkpoints/     step-N, enough to resume to the same bits
  adapter/ | model/    the result, in PEFT's or transformers' format
  samples.jsonl  plots/
"""

import hashlib
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch

from kernels.dispatch import asked_backend

from . import world
from .fingerprint import fingerprints
from .flags import TrainerFlags
from .metrics import read_metrics
from .safety import write_aside, writing

RESUMABLE = {"out", "resume", "save_every", "keep_checkpoints", "samples", "optimizer_budget", "optimizer_spill"}
"""Flags that may change between a run and its continuation: they do not touch a bit of the result."""
PARTS = ("config", "environment", "files")


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


def check(out: Path, config: TrainerFlags | Mapping[str, Any], env: Mapping[str, Any], *, resume: bool) -> None:
    """Whether a run may write here: a new one nowhere near an old one, a resumed one as it was. Writes nothing.

    A flag that the run's folder does not know is younger than the run: what it does by default is what was done then.
    Raises ValueError when the folder holds a run and resume is not asked for, when there is nothing to resume, or,
    naming the field, when a flag, a file of the model or the environment differs from the run's.
    """
    path = out / "config.json"
    if resume:
        before, flags = _read(path), asdict(config) if isinstance(config, TrainerFlags) else dict(config)
        _check_same(before.get("config", {}), flags, path, _defaults(config))
        for part, now in {"environment": env, "files": fingerprints(flags)}.items():
            _check_same(before.get(part, {}), now, path, now)
        return
    if path.exists():
        raise ValueError(f"{out} holds a run already: pass --resume to go on with it, or another --out")


def create(out: Path, config: Mapping[str, Any], env: Mapping[str, Any], warnings: Sequence[str]) -> None:
    """Make the folder and its config.json: once the data and the model are known to be good."""
    world.wait_for_all()  # a rank that is still in `check` must not find this run and take it for an old one
    if world.is_main():
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        parts = {"config": config, "environment": env, "files": fingerprints(config), "warnings": list(warnings)}
        write_json(out / "config.json", parts)


def clear_unfinished(out: Path) -> None:
    """Delete what a killed run was writing aside (lora/files.py): nothing there has a name yet."""
    for pattern in ("checkpoints/.step-*", ".adapter.*", ".model.*"):
        for aside in out.glob(pattern):
            shutil.rmtree(aside)


def last_row_if_finished(out: Path, total_steps: int) -> dict[str, Any] | None:
    """The last row of metrics.jsonl, where that is of the last step and the result is saved."""
    rows = read_metrics(out / "metrics.jsonl")
    saved = (out / "adapter").is_dir() or (out / "model").is_dir()
    return rows[-1] if saved and rows and rows[-1]["step"] == total_steps else None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file aside and rename it into place. Raises OSError that names it."""
    with writing(path):
        write_aside(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"--resume needs a run to go on with, and {path.parent} holds none")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a JSON file: {error}") from None
    if not isinstance(config, dict) or not all(isinstance(config.get(part, {}), dict) for part in PARTS):
        raise ValueError(f"{path} is not a run's config.json: {', '.join(PARTS)} must be JSON objects")
    return config


def _defaults(config: TrainerFlags | Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(config, TrainerFlags):
        return {}
    made = {f.name: f.default_factory() for f in fields(config) if f.default_factory is not MISSING}
    return made | {f.name: f.default for f in fields(config) if f.default is not MISSING}


def _check_same(
    before: Mapping[str, Any], now: Mapping[str, Any], path: Path, where_missing: Mapping[str, Any]
) -> None:
    """Raises ValueError for the first field that differs. where_missing: what a field was that `before` has not."""
    for field, value in _as_json(now).items():
        was = before.get(field, _as_json(where_missing).get(field))
        if field not in RESUMABLE and was != value:
            raise ValueError(f"a resumed run must be as it was: {path} has {field} {was!r}, now it is {value!r}")


def _as_json(value: Mapping[str, Any]) -> Any:
    """As it reads after a file: a tuple is a list."""
    return json.loads(json.dumps(value))
