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
    rows = read_metrics(folder / "metrics.jsonl")
    try:
        said = lines(config, rows, all_checkpoints(folder / "checkpoints"))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'metrics.jsonl'} is not a run's: {type(error).__name__} {error}") from None
    print("\n".join(said))


def lines(config: dict[str, Any], rows: list[dict[str, Any]], checkpoints: list[Path]) -> list[str]:
    """What is printed, from the flags, metrics.jsonl and the checkpoints."""
    said = [", ".join(f"{name} {config[name]}" for name in SHOWN if config.get(name) is not None)]
    held_out = [row for row in rows if row.get("eval_reward") is not None]
    rows = [row for row in rows if row["step"] > 0]  # step 0 is an evaluation before training
    if rows:
        first, last = rows[0], rows[-1]
        said.append(f"steps        {last['step']}, {last['seconds']:.0f} s, {last['tokens_per_second']:,.0f} tokens/s")
        said.append(f"loss         {_number(first['loss'])} at step {first['step']}, {_number(last['loss'])} now")
        if rewards := [row for row in rows if row.get("reward") is not None]:
            said.append(
                f"reward       {rewards[0]['reward']:.4f} at step {rewards[0]['step']}, {rewards[-1]['reward']:.4f} now"
            )
        if held_out:
            ends = [f"{row['eval_reward']:.4f} at step {row['step']}" for row in (held_out[0], held_out[-1])]
            said.append(f"held out     reward {', '.join(ends)}")
        evaluations = [row for row in rows if row.get("eval_loss") is not None]
        if evaluations:
            at = evaluations[-1]
            apart = f", KL to the teacher {_number(at['eval_kl'])}" if "eval_kl" in at else ""
            said.append(f"held out     {_number(at['eval_loss'])}{apart} at step {at['step']}")
        if "rewards/margins" in last:
            accuracy, margin = (_number(last[f"rewards/{name}"]) for name in ("accuracies", "margins"))
            said.append(f"preferences  accuracy {accuracy}, margin {margin}")
        said.append(f"skipped      {last.get('skipped', 0)} updates whose loss or gradient was not finite")
        said.append(f"peak memory  {last['peak_memory_bytes'] / 1e9:.2f} GB")
        if "page_faults" in last:
            faults = "{minor:,} minor, {major:,} major (read from a disk)".format(**last["page_faults"])
            said.append(f"page faults  {faults}")
        if "paging" in last:
            said += _paging(last["paging"], rows[-2].get("paging") if len(rows) > 1 else None)
    said.append(f"checkpoints  {', '.join(path.name for path in checkpoints) or 'none'}")
    return said


def _paging(counters: dict[str, Any], before: dict[str, Any] | None) -> list[str]:
    """The optimizer's pages: since the run began or was resumed, and in the last step."""
    said = [
        "paging       {hits:,} hits, {misses:,} misses, waited {wait_seconds:.1f} s".format(**counters),
        "             in: {page_ins:,} pages, {bytes_in:,} bytes".format(**counters),
        "             out: {page_outs:,} pages, {bytes_out:,} bytes".format(**counters),
        "             now: {resident_bytes:,} bytes resident, {spilled_bytes:,} spilled".format(**counters),
    ]
    if before is not None and before["misses"] <= counters["misses"]:  # not just resumed
        step = {name: counters[name] - before[name] for name in ("hits", "misses", "bytes_in", "bytes_out")}
        moved = "{hits:,} hits, {misses:,} misses, {bytes_in:,} bytes in, {bytes_out:,} out".format(**step)
        said.append(f"             last step: {moved}")
    return said


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
