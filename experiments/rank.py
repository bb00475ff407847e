"""The rank of LoRA on all linear layers, from 1 to 256. docs/experiments/rank.md reads the result.

    python -m experiments.rank               (qlora experiment rank)

QLoRA (arXiv 2305.14314) appendix A.1, figure 4: with adapters on every linear layer, r from 8 up makes no difference
(searched to 256). The update is scaled by alpha / r with one alpha, and the rate searched, as there.
"""

import argparse
from typing import Any

from .finetuning import Arm, arms_of, compare, differences, summary, task, tried
from .pages import Rows, publish

RANKS = (1, 4, 16, 64, 256)
ARMS = tuple(Arm(f"r = {r}", r=r) for r in RANKS)
AGAINST = "r = 16"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two steps a run, to see that it runs")
    quick = parser.parse_args(argv).quick
    rows = compare(task(quick), ARMS)
    publish("rank", rows, key="arm", tables=tables, draw=draw, quick=quick)


def tables(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    return {"arms": summary(rows, AGAINST), "rates": tried(rows)}


def draw(axes: list[Any], rows: Rows) -> None:
    """Test loss of every seed over r."""
    (ax,) = axes
    arms = [arm for arm in arms_of(rows) if arm != "base"]
    ranks = [int(arm.removeprefix("r = ")) for arm in arms]
    found = [differences(rows, arm, AGAINST) for arm in arms]
    ax.plot(ranks, [sum(of) / len(of) for of in found], marker="o")
    for r, of in zip(ranks, found, strict=True):
        ax.plot([r] * len(of), of, "k.")
    ax.set(xscale="log", xlabel="r", ylabel=f"test loss minus that of {AGAINST}, nats a byte")
    ax.set_xticks(ranks, [str(r) for r in ranks])
    ax.grid(alpha=0.3)


if __name__ == "__main__":
    main()
