"""Fine-tuning the small model on another text: what the experiments targets, rank and lora_vs_full share.

The base has read English (small_model.py). It is tuned on source code out of the standard library: rows drawn from
thousands, so that hardly one comes twice. The text lies in modules, and no module is on two sides:

    train   where the batches come from
    dev     chooses each arm's learning rate, one run a rate, with the first seed
    test    what is reported, at that rate, one run for each seed

Every arm has its own best rate of one grid, found by a walk from the same start until the best has a worse neighbour
on either side. A seed gives the batches and the start of the adapter; all arms see the same batches with the same seed,
so that their differences are taken seed by seed.
"""

import copy
import math
import statistics
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lora import LoRAConfig, add_adapter, trainable_parameters
from lora.attach import quantize_model
from models import Decoder

from .pages import Rows
from .small_model import LENGTH, fit, small_model, split, untrained
from .text import row_losses, rows_of, source

TRAIN = (
    "argparse", "ast", "configparser", "dataclasses", "difflib", "doctest", "enum", "functools", "ipaddress", "mailbox",
    "optparse", "pdb", "pickle", "pydoc", "shutil", "socket", "traceback",
)  # fmt: skip
DEV, TEST = ("subprocess", "textwrap"), ("tarfile", "typing", "statistics")
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
START = 3
SEEDS = (1, 2, 3)
STEPS, BATCH, ALPHA = 50, 4, 32

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
        return Task(untrained(), train, dev[:4], test[:4], old[:4], steps=2, seeds=(1, 2), rates=(1e-3, 1e-2))
    return Task(small_model(), train, some(dev, 32), some(test, 64), some(old, 32))


def some(rows: list[list[int]], n: int) -> list[list[int]]:
    """n of the rows, spread over them."""
    return rows[:: max(1, len(rows) // n)][:n]


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


def measured(of: Task, arm: Arm, rate: float, seed: int) -> dict[str, Any]:
    """The row of one run: nats a byte on each text; of a run that diverged, infinity."""
    try:
        model = tuned(of, arm, rate, seed)
    except ValueError:
        model = None
    return _row(of, arm, rate, seed, model)


def _row(of: Task, arm: Arm, rate: float, seed: int, model: Decoder | None) -> dict[str, Any]:
    row = {"arm": arm.name, "method": arm.method, "r": arm.r or "", "trained": trained_by(of.base, arm)}
    texts = {"dev": of.dev, "test": of.test, "old text": of.old}
    losses = {name: float(row_losses(model, rows).mean()) if model else math.inf for name, rows in texts.items()}
    return row | {"rate": rate, "seed": seed} | {name: round(loss, 5) for name, loss in losses.items()}


def at_best_rate(of: Task, arm: Arm, every_rate: bool = False) -> list[dict[str, Any]]:
    """The rows of the rates tried with the first seed, in order, then of the other seeds at the best, or at all."""
    found: dict[int, dict[str, Any]] = {}
    at = min(START, len(of.rates) - 1)
    while True:
        for i in (at - 1, at, at + 1):
            if 0 <= i < len(of.rates) and i not in found:
                found[i] = measured(of, arm, of.rates[i], of.seeds[0])
        best = min(found, key=lambda i: found[i]["dev"])
        if best == at:
            break
        at = best
    again = sorted(found) if every_rate else [at]
    others = [measured(of, arm, of.rates[i], seed) for i in again for seed in of.seeds[1:]]
    return [found[i] for i in sorted(found)] + others


def compare(of: Task, arms: tuple[Arm, ...], every_rate: bool = False) -> list[dict[str, Any]]:
    """The base's row, then every run of every arm."""
    base = _row(of, Arm("base", "none", 0, ()), 0.0, 0, of.base)
    return [base, *(row for arm in arms for row in at_best_rate(of, arm, every_rate))]


def trained_by(base: Decoder, arm: Arm) -> int:
    """Parameters that an arm trains."""
    if arm.method == "none":
        return 0
    if arm.method == "full":
        return sum(parameter.numel() for parameter in base.parameters())
    model = copy.deepcopy(base)
    add_adapter(model, LoRAConfig(r=arm.r, target_modules=list(arm.targets)))
    return sum(parameter.numel() for _, parameter in trainable_parameters(model))


def arms_of(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows))


def reported(rows: Rows, arm: str) -> dict[str, dict[str, str]]:
    """seed → the run at the arm's best rate."""
    of = [row for row in rows if row["arm"] == arm]
    first = [row for row in of if row["seed"] == of[0]["seed"]]
    rate = min(first, key=lambda row: float(row["dev"]))["rate"]
    return {row["seed"]: row for row in of if row["rate"] == rate}


def summary(rows: Rows, against: str) -> list[dict[str, Any]]:
    """A line for each arm: mean over the seeds ± their standard deviation, and the same of its differences.

    gain: what the arm's mean takes from the base's loss, as a share of what `against` takes.
    """
    base = statistics.fmean(float(run["test"]) for run in reported(rows, "base").values())
    whole = base - statistics.fmean(float(run["test"]) for run in reported(rows, against).values())
    lines = []
    for arm in arms_of(rows):
        runs = reported(rows, arm)
        first = next(iter(runs.values()))
        is_base = first["method"] == "none"
        lines.append(
            {
                "arm": arm,
                "trained": f"{int(first['trained']):,}",
                "best rate": "" if is_base else f"{float(first['rate']):g}",
                "test loss": with_spread([float(run["test"]) for run in runs.values()]),
                f"minus {against}": "" if is_base else with_spread(differences(rows, arm, against), "+"),
                "gain": "" if is_base else f"{1 - statistics.fmean(differences(rows, arm, against)) / whole:.0%}",
                "loss on the old text": with_spread([float(run["old text"]) for run in runs.values()]),
            }
        )
    return lines


def differences(rows: Rows, arm: str, against: str) -> list[float]:
    """Test loss of an arm minus another's, seed by seed."""
    others = reported(rows, against)
    return [float(run["test"]) - float(others[seed]["test"]) for seed, run in reported(rows, arm).items()]


def tried(rows: Rows) -> list[dict[str, Any]]:
    """Dev loss of each arm at each rate, first seed; a blank where the walk did not come by."""
    lines = []
    for arm in arms_of(rows):
        of = [row for row in rows if row["arm"] == arm and row["method"] != "none"]
        losses = {float(row["rate"]): row["dev"] for row in reversed(of) if row["seed"] == of[0]["seed"]}
        if losses:
            lines.append({"dev loss": arm} | {f"{rate:g}": losses.get(rate, "") for rate in RATES})
    return lines


def with_spread(values: list[float], sign: str = "") -> str:
    """Mean ± standard deviation; of one value, the value."""
    mean = f"{statistics.fmean(values):{sign}.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"
