"""Fine-tuning the small model on another text: what the experiments targets, rank and lora_vs_full share.

The base has read English (small_model.py). It is tuned on source code out of the standard library, once over: no row
comes twice but by chance. The text lies in modules, and no module is on two sides:

    train   where the batches come from
    dev     chooses each arm's learning rate, one run a rate (seed 0)
    test    what is reported, at that rate, one run for each of SEEDS

Every arm has its own best rate of one grid, found by a walk from the same start until the best has a worse neighbour
on either side. A seed gives the batches and the start of the adapter; all arms see the same batches with the same seed,
so that their differences are taken seed by seed.
"""

import copy
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora import LoRAConfig, add_adapter, trainable_parameters
from lora.attach import quantize_model
from models import Decoder

from .pages import Rows
from .small_model import FOLDER, LENGTH, fit, small_model, split
from .text import row_losses, rows_of, source

TRAIN = (
    "argparse", "ast", "configparser", "dataclasses", "difflib", "doctest", "enum", "functools", "ipaddress", "mailbox",
    "optparse", "pdb", "pickle", "pydoc", "shutil", "socket", "traceback",
)  # fmt: skip
DEV, TEST = ("subprocess", "textwrap"), ("tarfile", "typing", "statistics")
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
START = 3
SEEDS = (1, 2, 3)
STEPS, BATCH, ALPHA = 60, 4, 32

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
ALL = (*ATTENTION, *MLP)


class Arm(NamedTuple):
    """What is trained. The update is scaled by ALPHA / r."""

    name: str
    method: str = "lora"
    r: int = 16
    targets: tuple[str, ...] = ALL


@dataclass(frozen=True)
class Task:
    """The base and its texts: rows of bytes."""

    base: Decoder
    train: list[list[int]]
    dev: list[list[int]]
    test: list[list[int]]
    old: list[list[int]]
    """held out of what the base had read"""
    steps: int = STEPS
    seeds: tuple[int, ...] = SEEDS
    rates: tuple[float, ...] = RATES


def task(quick: bool = False) -> Task:
    """The task as measured, or one of seconds that shows nothing but that all runs."""
    train, dev, test = (rows_of(source(modules).encode(), LENGTH) for modules in (TRAIN, DEV, TEST))
    old = split()[1]
    if quick:
        base = small_model(Path(f"{FOLDER}_quick"), steps=2)
        return Task(base, train, dev[:4], test[:4], old[:4], steps=2, seeds=(1, 2), rates=(1e-3, 1e-2))
    spread = max(1, len(dev) // 64), max(1, len(test) // 128)
    return Task(small_model(), train, dev[:: spread[0]][:64], test[:: spread[1]][:128], old)


def tuned(of: Task, arm: Arm, rate: float, seed: int) -> Decoder:
    """The base fine-tuned. Raises ValueError when it diverges."""
    torch.manual_seed(seed)
    model = copy.deepcopy(of.base)
    if arm.method == "full":
        model.requires_grad_(True)
    else:
        if arm.method == "qlora":
            quantize_model(model)
        add_adapter(model, LoRAConfig(r=arm.r, alpha=ALPHA, target_modules=list(arm.targets)))
    batches = torch.Generator().manual_seed(seed)
    fit(model, of.train, steps=of.steps, batch_size=BATCH, rate=rate, generator=batches)
    return model.eval()


def mean_loss(model: Decoder, rows: list[list[int]]) -> float:
    """Nats a byte."""
    return float(row_losses(model, rows).mean())


def best_rate(of: Task, arm: Arm) -> tuple[float, list[dict[str, Any]]]:
    """The rate with the lowest dev loss where neighbours are worse, and a row for each rate tried."""
    found: dict[int, float] = {}
    at = min(START, len(of.rates) - 1)
    while True:
        for i in (at - 1, at, at + 1):
            if 0 <= i < len(of.rates) and i not in found:
                found[i] = _dev_loss(of, arm, of.rates[i])
        best = min(found, key=found.__getitem__)
        if best == at:
            break
        at = best
    rows = [_row(of, arm, rate=of.rates[i], seed=0, split="dev", loss=found[i], old=math.nan) for i in sorted(found)]
    return of.rates[at], rows


def _dev_loss(of: Task, arm: Arm, rate: float) -> float:
    try:
        return mean_loss(tuned(of, arm, rate, 0), of.dev)
    except ValueError:  # it diverged
        return math.inf


def compare(of: Task, arms: tuple[Arm, ...]) -> list[dict[str, Any]]:
    """The base's row, then every run of every arm."""
    before = _row(
        of, Arm("base", "none", 0, ()), 0.0, 0, "test", mean_loss(of.base, of.test), mean_loss(of.base, of.old)
    )
    rows = [before]
    for arm in arms:
        rate, tried = best_rate(of, arm)
        rows += tried
        for seed in of.seeds:
            model = tuned(of, arm, rate, seed)
            rows.append(_row(of, arm, rate, seed, "test", mean_loss(model, of.test), mean_loss(model, of.old)))
    return rows


def _row(of: Task, arm: Arm, rate: float, seed: int, split: str, loss: float, old: float) -> dict[str, Any]:
    numbers = {"loss": round(loss, 5), "old text": "" if math.isnan(old) else round(old, 5)}
    row = {"arm": arm.name, "method": arm.method, "r": arm.r or "", "trained": trained_by(of.base, arm)}
    return row | {"rate": rate, "seed": seed, "split": split} | numbers


def trained_by(base: Decoder, arm: Arm) -> int:
    """Parameters that an arm trains."""
    if arm.method == "none":
        return 0
    if arm.method == "full":
        return sum(parameter.numel() for parameter in base.parameters())
    model = copy.deepcopy(base)
    add_adapter(model, LoRAConfig(r=arm.r, target_modules=list(arm.targets)))
    return sum(parameter.numel() for _, parameter in trainable_parameters(model))


def tests_of(rows: Rows, arm: str) -> dict[str, dict[str, str]]:
    """seed → the row on the test text."""
    return {row["seed"]: row for row in rows if row["arm"] == arm and row["split"] == "test"}


def arms_of(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows))


def summary(rows: Rows, against: str) -> list[dict[str, Any]]:
    """A line for each arm: mean over the seeds ± their standard deviation, and the same of its differences."""
    lines = []
    for arm in arms_of(rows):
        runs = tests_of(rows, arm)
        first = next(iter(runs.values()))
        lines.append(
            {
                "arm": arm,
                "trained": f"{int(first['trained']):,}",
                "best rate": "" if first["method"] == "none" else f"{float(first['rate']):g}",
                "test loss": with_spread([float(run["loss"]) for run in runs.values()]),
                f"minus {against}": ""
                if first["method"] == "none"
                else with_spread(differences(rows, arm, against), "+"),
                "loss on the old text": with_spread([float(run["old text"]) for run in runs.values()]),
            }
        )
    return lines


def differences(rows: Rows, arm: str, against: str) -> list[float]:
    """Test loss of an arm minus another's, seed by seed."""
    others = tests_of(rows, against)
    return [float(run["loss"]) - float(others[seed]["loss"]) for seed, run in tests_of(rows, arm).items()]


def tried(rows: Rows) -> list[dict[str, Any]]:
    """Dev loss of each arm at each rate; a blank where the walk did not come by."""
    lines = []
    for arm in arms_of(rows):
        of = {float(row["rate"]): row["loss"] for row in rows if row["arm"] == arm and row["split"] == "dev"}
        if of:
            lines.append({"dev loss": arm} | {f"{rate:g}": of.get(rate, "") for rate in RATES})
    return lines


def with_spread(values: list[float], sign: str = "") -> str:
    """Mean ± standard deviation; of one value, the value."""
    mean = f"{statistics.fmean(values):{sign}.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"
