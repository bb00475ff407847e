"""LoRA and QLoRA beside full fine-tuning, each at its own best learning rate. docs/experiments/lora_vs_full.md.

    python -m experiments.lora_vs_full       (qlora experiment lora_vs_full)

QLoRA (arXiv 2305.14314) section 4, tables 3 and 4: LoRA and QLoRA in NF4 come to full 16-bit fine-tuning. "LoRA Learns
Less and Forgets Less" (arXiv 2405.09673): on code and mathematics LoRA stays behind, and keeps more of what was there.
"LoRA Without Regret" (Thinking Machines, 2025): the best rate of LoRA is about ten times that of full fine-tuning.
"""

import argparse
from typing import Any

from .finetuning import RATES, Arm, arms_of, compare, summary, task, tried, with_spread
from .pages import Rows, publish

ARMS = (Arm("full", "full", 0, ()), Arm("LoRA", "lora"), Arm("QLoRA", "qlora"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two steps a run, to see that it runs")
    quick = parser.parse_args(argv).quick
    rows = compare(task(quick), ARMS, every_rate=True)
    publish("lora_vs_full", rows, key="arm", tables=tables, draw=draw, panels=(1, 2), quick=quick)


def tables(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    return {"arms": summary(rows, "full"), "rates": tried(rows), "tests": by_rate(rows)}


def by_rate(rows: Rows) -> list[dict[str, Any]]:
    """Test loss of each arm at each rate, mean ± standard deviation over the seeds."""
    lines = []
    for arm in arms_of(rows)[1:]:
        losses = {
            rate: [float(r["test"]) for r in rows if r["arm"] == arm and float(r["rate"]) == rate] for rate in RATES
        }
        lines.append({"test loss": arm} | {f"{rate:g}": with_spread(of) if of else "" for rate, of in losses.items()})
    return lines


def draw(axes: list[Any], rows: Rows) -> None:
    """What is learnt over what is forgotten, and over the rate: every run."""
    learnt, rates = axes
    for arm in arms_of(rows)[1:]:
        of = [row for row in rows if row["arm"] == arm]
        loss = [float(row["test"]) for row in of]
        learnt.plot([float(row["old text"]) for row in of], loss, "o", label=arm)
        rates.plot([float(row["rate"]) for row in of], loss, "o", label=arm)
    learnt.plot(float(rows[0]["old text"]), float(rows[0]["test"]), "k*", markersize=10, label="base")
    learnt.set(xlabel="loss on the old text (English)", ylabel="test loss on the new (source code)")
    rates.set(xlabel="learning rate", ylabel="test loss", xscale="log")
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.legend()


if __name__ == "__main__":
    main()
