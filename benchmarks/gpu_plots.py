"""Plots of `qlora bench gpu`: for each operation of a model a panel for each layer, time over rows, a line an arm."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BY_ROWS = ("forward", "dx", "lora", "cross-entropy")


def plot(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """gpu-GPU-MODEL-OP.png for what was timed with double quantization. Where matplotlib is not, nothing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    written = []
    for op in BY_ROWS:
        timed = [row for row in rows if row["op"] == op and row["status"] == "ok" and row["double_quant"]]
        if not timed:
            continue
        layers = list(dict.fromkeys(row["layer"] for row in timed))
        figure = Figure(figsize=(4.2 * len(layers), 3.6), layout="constrained")
        panels = figure.subplots(1, len(layers), squeeze=False)[0]
        for panel, layer in zip(panels, layers, strict=True):
            _panel(panel, [row for row in timed if row["layer"] == layer])
        first = timed[0]
        figure.suptitle(f"{op}, {first['model']}, {first['dtype']}, {first['gpu']}")
        panels[0].set_ylabel("ms (20 % to 80 % shaded)")
        panels[0].legend(fontsize=7)
        name = re.sub(r"[^A-Za-z0-9.]+", "-", f"gpu {first['gpu']} {first['model']} {op}")
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=120)
        written.append(path)
    return written


def _panel(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    for arm in dict.fromkeys(row["arm"] for row in rows):
        points = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["M"])
        M = [row["M"] for row in points]
        low, middle, high = ([float(row[p]) for row in points] for p in ("p20_ms", "p50_ms", "p80_ms"))
        axes.plot(M, middle, marker="o", markersize=3, label=arm)
        axes.fill_between(M, low, high, alpha=0.2)
    axes.set(xscale="log", yscale="log", xlabel="M", title=f"{rows[0]['layer']}: {rows[0]['N']} × {rows[0]['K']}")
    axes.grid(alpha=0.3)
