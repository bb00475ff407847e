"""qlora bench roofline: the least time that a 4-bit product can take on a GPU, from its bytes and its FLOPs.

    FLOPs    = 2 · M · N · K                                  forward (y = x · Ŵᵀ) and dx (dy · Ŵ) alike
    bytes    = weight + 2 · M · (N + K)                       x and y, or dy and dx, in 16 bits, each moved once
    weight   = N·K/2 + scales                                 scales: 4 bytes a block of 64, or with double quantization
                                                              1 byte a block and 4 bytes every 256 blocks
    bound    = max(bytes / bandwidth, FLOPs / peak)           whichever is more: "memory" or "compute"

Beside it the same for a dense 16-bit weight, and for dequantizing first: read the 4 bits, write 16, then a dense
product. Bounds, not measurements: a kernel takes longer, by its instructions (`qlora bench compile`) and by stalls.

Peaks: multiprocessors · clock · dense FLOPs a clock and multiprocessor of the 16-bit tensor cores with fp32 sums
(GeForce cards do half of what their chips' server cards do), and memory bandwidth. They are the vendor's data sheets'
(A100: 312 TFLOP/s, 2,039 GB/s). The T4 is not here, since no figure of its was checked.

    qlora bench roofline -- --models llama-3-70b --gpus A100 H100 --csv roofline.csv
"""

import argparse
import csv
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.shapes import MODELS, ROWS


@dataclass(frozen=True)
class GPU:
    multiprocessors: int
    gigahertz: float
    flops_a_clock: int
    """of one multiprocessor"""
    gigabytes_a_second: int

    @property
    def peak(self) -> float:
        """FLOPs a second."""
        return self.multiprocessors * self.gigahertz * 1e9 * self.flops_a_clock

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.gigabytes_a_second * 1e9


GPUS = {
    "A100": GPU(108, 1.41, 2048, 2039),
    "A10": GPU(72, 1.70, 1024, 600),
    "3090": GPU(82, 1.70, 512, 936),
    "L4": GPU(58, 2.04, 1024, 300),
    "4090": GPU(128, 2.52, 512, 1008),
    "H100": GPU(132, 1.83, 4096, 3350),
    "H200": GPU(132, 1.83, 4096, 4800),
    "B200": GPU(148, 1.85, 8192, 8000),
    "5090": GPU(170, 2.41, 512, 1792),
}


@dataclass(frozen=True)
class Bound:
    """One product on one GPU. Times in microseconds."""

    gpu: str
    model: str
    layer: str
    N: int
    K: int
    M: int
    double_quant: bool
    bytes: int
    flops: int
    intensity: float
    """FLOPs a byte"""
    memory_us: float
    compute_us: float
    bound_us: float
    bound_by: str
    dequantized_first_us: float
    dense_us: float


def weight_bytes(N: int, K: int, double_quant: bool) -> int:
    """4-bit codes and scales of (N, K); the maps, one for all layers, apart."""
    blocks = -(-N * K // 64)
    return -(-N * K // 2) + (blocks + 4 * -(-blocks // 256) if double_quant else 4 * blocks)


def bound(gpu: str, model: str, layer: str, M: int, double_quant: bool = True) -> Bound:
    N, K = MODELS[model][layer]
    card = GPUS[gpu]
    stored, activations, flops = weight_bytes(N, K, double_quant), 2 * M * (N + K), 2 * M * N * K

    def microseconds(moved: int) -> float:
        return 1e6 * max(moved / card.bandwidth, flops / card.peak)

    moved = stored + activations
    memory, compute = 1e6 * moved / card.bandwidth, 1e6 * flops / card.peak
    dense = microseconds(2 * N * K + activations)
    dequantize = 1e6 * (stored + 2 * N * K) / card.bandwidth
    by = "memory" if memory >= compute else "compute"
    times = (memory, compute, max(memory, compute), by, dequantize + dense, dense)
    return Bound(gpu, model, layer, N, K, M, double_quant, moved, flops, flops / moved, *times)


def render(bounds: Sequence[Bound]) -> Table:
    """A line for each product, a column for each GPU: microseconds, with m or c for what bounds them."""
    gpus = list(dict.fromkeys(b.gpu for b in bounds))
    table = Table("layer", "N×K", "M", "MB", "GFLOP", "FLOP/B", *gpus, title=f"{bounds[0].model}: µs at least")
    lines: dict[tuple[str, int], list[Bound]] = {}
    for b in bounds:
        lines.setdefault((b.layer, b.M), []).append(b)
    for (layer, M), of_gpus in lines.items():
        first = of_gpus[0]
        size = f"{first.bytes / 1e6:.2f}", f"{first.flops / 1e9:.2f}", f"{first.intensity:.0f}"
        cells = (f"{b.bound_us:.1f} {b.bound_by[0]}" for b in of_gpus)
        table.add_row(layer, f"{first.N}×{first.K}", str(M), *size, *cells)
    return table


def write_csv(bounds: Sequence[Bound], path: Path) -> None:
    """Written beside `path` and renamed."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(bounds[0])), lineterminator="\n")
        writer.writeheader()
        for b in bounds:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(b).items()})
    os.replace(aside, path)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--models", nargs="+", choices=MODELS, default=["llama-3-8b"])
    flags.add_argument("--gpus", nargs="+", choices=GPUS, default=list(GPUS))
    flags.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="M: rows of x")
    flags.add_argument("--no-double-quant", action="store_true")
    flags.add_argument("--csv", type=Path, help="write every figure there")
    args = flags.parse_args()
    every: list[Bound] = []
    for model in args.models:
        cases = [(layer, M) for layer in MODELS[model] for M in args.rows]
        found = [bound(gpu, model, layer, M, not args.no_double_quant) for layer, M in cases for gpu in args.gpus]
        Console().print(render(found))
        every += found
    print("m: bound by memory, c: by compute. Bounds from data sheets, not measurements.")
    if args.csv:
        write_csv(every, args.csv)


if __name__ == "__main__":
    main()
