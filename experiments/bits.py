"""What double quantization saves, counted from the bytes. docs/experiments/bits.md reads the result.

    python -m experiments.bits               (qlora experiment bits)

    plain     4 + 32 / 64                                bits a weight: a code, and an fp32 scale for 64 of them
    double    4 + 8 / 64 + 32 / (64 · 256)               the scale in 8 bits, and an fp32 scale for 256 of those
    saved     0.3730 bits a weight                       QLoRA (arXiv 2305.14314) section 3: 0.373, about 3 GB at 65B

"counted" is what QuantizedTensor holds for a weight of 4096 × 4096; a mean of 4 bytes a weight comes to it.
"""

import argparse
from typing import Any

import torch

from quant import quantize

from .pages import Rows, publish

SIZES = {"SmolLM2-135M": 106_168_320, "7B": 7e9, "65B": 65e9}
"""Weights in 4 bits: of SmolLM2 its linear layers; of the paper's, all."""


def bits_per_weight(blocksize: int, double_quant: bool) -> float:
    """By the formulas above, for absmax blocks of `blocksize` and their blocks of 256."""
    return 4 + (8 / blocksize + 32 / (blocksize * 256) if double_quant else 32 / blocksize)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave the page as it is")
    quick = parser.parse_args(argv).quick
    rows = []
    for blocksize in (32, 64, 128, 256):
        plain, double = (bits_per_weight(blocksize, double) for double in (False, True))
        q = quantize(torch.zeros(4096, 4096), blocksize=blocksize)
        saved = {f"saved, {name}": f"{(plain - double) / 8 * n / 1e9:.3f} GB" for name, n in SIZES.items()}
        rows.append(
            {
                "blocksize": blocksize,
                "plain": f"{plain:.4f}",
                "double": f"{double:.4f}",
                "counted": f"{q.bits_per_param:.4f}",
                "saved": f"{plain - double:.4f}",
                **saved,
            }
        )
    publish("bits", rows, key="blocksize", draw=draw, quick=quick)


def draw(axes: list[Any], rows: Rows) -> None:
    """Bits a weight over the block size."""
    (ax,) = axes
    sizes = [int(row["blocksize"]) for row in rows]
    for name in ("plain", "double"):
        ax.plot(sizes, [float(row[name]) for row in rows], marker="o", label=f"scales {name}")
    ax.set(xlabel="blocksize", ylabel="bits a weight", xscale="log")
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend()


if __name__ == "__main__":
    main()
