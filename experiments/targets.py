"""Adapters on every linear layer, on attention alone, on the MLP alone: of equal size. docs/experiments/targets.md.

    python -m experiments.targets            (qlora experiment targets)

QLoRA (arXiv 2305.14314) section 4, figure 2: LoRA on all linear layers is needed to match full fine-tuning; on query
and value, the usual choice, it does not. "LoRA Without Regret" (Thinking Machines, 2025): attention alone is worse at
equal numbers of parameters too, and the MLP alone is as good as everything.

    all linear r = 32     attention r = 77     query and value r = 154      630,784 parameters each
    MLP r = 55                                                              633,600
"""

import argparse
from typing import Any

from .finetuning import ATTENTION, MLP, Arm, arms_of, compare, differences, reported, summary, task, tried
from .pages import Rows, publish

ARMS = (
    Arm("all linear", r=32),
    Arm("MLP", r=55, targets=MLP),
    Arm("attention", r=77, targets=ATTENTION),
    Arm("query and value", r=154, targets=("q_proj", "v_proj")),
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two steps a run, to see that it runs")
    quick = parser.parse_args(argv).quick
    rows = compare(task(quick), ARMS)
    publish("targets", rows, key="arm", tables=tables, draw=draw, quick=quick)


def tables(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    return {"arms": summary(rows, "all linear"), "rates": tried(rows)}


def draw(axes: list[Any], rows: Rows) -> None:
    """Test loss minus all linear's: a point for each seed, a bar for the mean."""
    (ax,) = axes
    arms = [arm for arm in arms_of(rows) if arm != "base"]
    for i, arm in enumerate(arms):
        found = differences(rows, arm, "all linear")
        ax.bar(i, sum(found) / len(found), color="lightsteelblue")
        ax.plot([i] * len(found), found, "k.")
    labels = [f"{arm}\nr = {next(iter(reported(rows, arm).values()))['r']}" for arm in arms]
    ax.set(ylabel="test loss minus all linear's, nats a byte", xticks=range(len(arms)), xticklabels=labels)
    ax.grid(alpha=0.3, axis="y")


if __name__ == "__main__":
    main()
