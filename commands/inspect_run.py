"""qlora inspect run: how a run went, or goes: loss, speed, peak memory, what its optimizer's pages did, checkpoints."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from trainers.checkpoint import all_checkpoints
from trainers.metrics import read_metrics

SHOWN = ("method", "model", "data", "max_steps", "optimizer", "optimizer_budget", "optimizer_spill", "seed")


@dataclass(frozen=True)
class InspectRunArgs:
    """Show how a run went."""

    run: tyro.conf.Positional[str]
    """its folder, such as runs/first"""


def run(args: InspectRunArgs) -> None:
    """Raises ValueError when the folder holds no run."""
    folder = Path(args.run)
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["config"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ValueError(f"{path} is not a run's config.json") from None
    for line in lines(config, read_metrics(folder / "metrics.jsonl"), all_checkpoints(folder / "checkpoints")):
        print(line)


def lines(config: dict[str, Any], rows: list[dict[str, Any]], checkpoints: list[Path]) -> list[str]:
    """What is printed, from the flags, metrics.jsonl and the checkpoints."""
    said = [", ".join(f"{name} {config[name]}" for name in SHOWN if config.get(name) is not None)]
    if rows:
        first, last = rows[0], rows[-1]
        said.append(f"steps        {last['step']}, {last['seconds']:.0f} s, {last['tokens_per_second']:,.0f} tokens/s")
        said.append(f"loss         {_number(first['loss'])} at step {first['step']}, {_number(last['loss'])} now")
        evaluations = [row for row in rows if row.get("eval_loss") is not None]
        if evaluations:
            at = evaluations[-1]
            apart = f", KL to the teacher {_number(at['eval_kl'])}" if "eval_kl" in at else ""
            said.append(f"held out     {_number(at['eval_loss'])}{apart} at step {at['step']}")
        said.append(f"skipped      {last.get('skipped', 0)} updates whose loss or gradient was not finite")
        said.append(f"peak memory  {last['peak_memory_bytes'] / 1e9:.2f} GB")
        if "paging" in last:
            said += _paging(last["paging"])
    said.append(f"checkpoints  {', '.join(path.name for path in checkpoints) or 'none'}")
    return said


def _paging(counters: dict[str, Any]) -> list[str]:
    return [
        "paging       {hits:,} hits, {misses:,} misses, waited {wait_seconds:.1f} s".format(**counters),
        "             in: {page_ins:,} pages, {bytes_in:,} bytes".format(**counters),
        "             out: {page_outs:,} pages, {bytes_out:,} bytes".format(**counters),
        "             now: {resident_bytes:,} bytes resident, {spilled_bytes:,} spilled".format(**counters),
    ]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
