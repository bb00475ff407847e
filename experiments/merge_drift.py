"""Merging an adapter into 4-bit weights and taking it out again, several times. docs/experiments/merge_drift.md.

    python -m experiments.merge_drift        (qlora experiment merge_drift)

    merge       q ← quantize(dequantize(q) + ΔW)
    unmerge     q ← quantize(dequantize(q) - ΔW)         as PEFT does it: from the rounded weight

Weights: one linear layer of each kind of SmolLM2 in NF4 with double quantization. ΔW = s·BA of rank 16 with normal
entries, ‖ΔW‖ a share of ‖W‖.

    merged error   ‖dequantize(q merged) - (W + ΔW)‖ / ‖ΔW‖        near 1: the adapter is lost
    drift          ‖dequantize(q unmerged) - W‖ / ‖ΔW‖             W the 4-bit weight before the first merge
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import kernels
from models.load import load_weight
from quant import QuantizedTensor

from .pages import Rows, publish

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
SHARES = (0.003, 0.01, 0.03, 0.1)
CYCLES = 3


def delta_of(weight: Tensor, share: float, r: int = 16) -> Tensor:
    """A random update of rank r whose norm is `share` of the weight's."""
    N, K = weight.shape
    update = torch.randn(N, r) @ torch.randn(r, K)
    return update * (share * weight.norm() / update.norm())


def cycles(q: QuantizedTensor, delta: Tensor) -> Iterator[tuple[float, float]]:
    """(merged error, drift) of each merge and unmerge, PEFT's way."""
    start, size = kernels.dequantize(q, torch.float32), float(delta.norm())
    for _ in range(CYCLES):
        before = kernels.dequantize(q, torch.float32)
        q = kernels.quantize(before + delta)
        merged = kernels.dequantize(q, torch.float32)
        q = kernels.quantize(merged - delta)
        drift = kernels.dequantize(q, torch.float32) - start
        yield float((merged - before - delta).norm()) / size, float(drift.norm()) / size


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one layer, to see that it runs")
    quick = parser.parse_args(argv).quick
    rows: list[dict[str, Any]] = []
    for kind in KINDS[:1] if quick else KINDS:
        _, weight = load_weight("smollm2-135m", f"layers.15.{kind}")
        assert isinstance(weight, Tensor), "the built-in model is dense"
        for share in SHARES:
            torch.manual_seed(0)
            found = cycles(kernels.quantize(weight), delta_of(weight, share))
            for cycle, (error, drift) in enumerate(found, start=1):
                numbers = {"merged error": round(error, 3), "drift": round(drift, 3)}
                rows.append({"layer": kind, "size of ΔW": share, "cycle": cycle, **numbers})
    publish("merge_drift", rows, key="layer", tables=tables, draw=draw, quick=quick)


def tables(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    """A line for each size of the update: the layers' range, after each cycle."""
    lines = []
    for share in SHARES:
        line = {"‖ΔW‖ / ‖W‖": f"{share:.1%}"}
        for field in ("merged error", "drift"):
            for cycle in range(1, CYCLES + 1):
                of = [r for r in rows if float(r["size of ΔW"]) == share and int(r["cycle"]) == cycle]
                values = [float(row[field]) for row in of]
                line[f"{field} {cycle}"] = f"{min(values):.2f} to {max(values):.2f}"
        lines.append(line)
    return {"": lines}


def draw(axes: list[Any], rows: Rows) -> None:
    """Drift over cycles for each size, the mean of the layers."""
    (ax,) = axes
    for share in SHARES:
        means = []
        for cycle in range(1, CYCLES + 1):
            of = [row for row in rows if float(row["size of ΔW"]) == share and int(row["cycle"]) == cycle]
            means.append(sum(float(row["drift"]) for row in of) / len(of))
        ax.plot(range(1, CYCLES + 1), means, marker="o", label=f"‖ΔW‖ = {share:.1%} of ‖W‖")
    ax.set(xlabel="merged and unmerged", ylabel="drift / ‖ΔW‖", ylim=0, xticks=range(1, CYCLES + 1))
    ax.grid(alpha=0.3)
    ax.legend()


if __name__ == "__main__":
    main()
