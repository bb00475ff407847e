"""4-bit formats: what each loses, in the weights and in perplexity. docs/experiments/formats.md reads the result.

    python -m experiments.formats            (qlora experiment formats)

Formats: NF4; FP4 as bitsandbytes has it; E2M1 and E3M0, the FP4 of the paper's table; symmetric INT4 (k/7); affine
INT4 (scale and minimum of each block in fp16, as llama.cpp's Q4_1); NF3, NF5. Block sizes 32 to 1024; absmax in 32
bits, or double-quantized. Every bit is counted.

Weights: N(0, 1), which NF4 is made for; a small model trained here, never rounded before; SmolLM2, whose weights come
from Q4_1 blocks of 32. Those lie on affine INT4's levels exactly, so its figures at 32 on SmolLM2 say nothing.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import kernels
from lora.attach import HEAD
from models import Decoder, load_model, load_tokenizer
from quant import dequantize, quantize

from .pages import Rows, publish
from .small_model import small_model, split, untrained
from .text import reference, row_losses, rows_of

KINDS = ("gaussian", "small", "smollm2")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024)
SMOLLM2_ROWS, SMOLLM2_LENGTH = 24, 128


class Rounded(NamedTuple):
    weight: Tensor
    bits: float
    """a weight, scales included"""


Format = Callable[[Tensor, int], Rounded]


def affine_int4(weight: Tensor, blocksize: int) -> Rounded:
    """ŵ = q · scale + minimum, q = 0 … 15, scale = (maximum - minimum) / 15; both of a block in fp16."""
    blocks = weight.reshape(-1, blocksize)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    minimum, scale = low.half().float(), ((high - low) / 15).half().float()
    q = ((blocks - minimum) / scale.clamp_min(1e-30)).round().clamp(0, 15)
    return Rounded((q * scale + minimum).view_as(weight), 4 + 32 / blocksize)


def by_code(quant_type: str, double_quant: bool = False) -> Format:
    """Through quantize and dequantize; the bits of a code are counted as if they were packed."""

    def rounded(weight: Tensor, blocksize: int) -> Rounded:
        run, back = (kernels.quantize, kernels.dequantize) if quant_type[-1] == "4" else (quantize, dequantize)
        q = run(weight, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant)
        code_bits = len(q.code).bit_length() - 1
        return Rounded(back(q, torch.float32), code_bits + 8 * (q.nbytes - q.packed.nbytes) / q.numel)

    return rounded


def by_magnitudes(*magnitudes: float) -> Format:
    """A sign and one of eight magnitudes, over the largest of them; absmax in 32 bits."""
    levels = torch.tensor(sorted({*magnitudes, *(-m for m in magnitudes)})) / max(magnitudes)
    midpoints = (levels[1:] + levels[:-1]) / 2

    def rounded(weight: Tensor, blocksize: int) -> Rounded:
        blocks = weight.reshape(-1, blocksize)
        absmax = blocks.abs().amax(1, keepdim=True).clamp_min(1e-30)
        return Rounded(
            (levels[torch.bucketize(blocks / absmax, midpoints)] * absmax).view_as(weight), 4 + 32 / blocksize
        )

    return rounded


FORMATS: dict[str, Format] = {
    "NF4": by_code("nf4"),
    "NF4, double": by_code("nf4", True),
    "FP4": by_code("fp4"),
    "FP4, double": by_code("fp4", True),
    "FP4 E2M1": by_magnitudes(0, 0.5, 1, 1.5, 2, 3, 4, 6),
    "FP4 E3M0": by_magnitudes(0, 0.25, 0.5, 1, 2, 4, 8, 16),
    "INT4": by_code("int4"),
    "INT4, double": by_code("int4", True),
    "affine INT4": affine_int4,
    "NF3": by_code("nf3"),
    "NF5": by_code("nf5"),
}


def has_perplexity(which: str, name: str, blocksize: int) -> bool:
    """On SmolLM2 one takes a quarter of a minute: of every format at 64, of some at 256, and of NF4 at every size."""
    if which != "smollm2":
        return which == "small"
    if name == "NF4":
        return True
    if blocksize == 256:
        return name in ("NF4, double", "FP4", "INT4", "affine INT4")
    if blocksize == 64:
        return name not in ("FP4, double", "INT4, double")
    return (name, blocksize) == ("affine INT4", 32)


def gaussian(size: int, blocksizes: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Errors on a weight of size × size drawn from N(0, 1)."""
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    for name, form in FORMATS.items():
        for blocksize in blocksizes:
            rounded = form(weight, blocksize)
            error = float((rounded.weight - weight).norm() / weight.norm())
            yield _row("gaussian", name, blocksize, rounded.bits, error)


def of_model(which: str, model: Decoder, rows: list[list[int]], sizes: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """The model as it is, then with its linear layers in each format; the head and embeddings stay."""
    layers = [m for path, m in model.named_modules() if isinstance(m, nn.Linear) and path != HEAD]
    plain = row_losses(model, rows)
    yield _row(which, "fp32", "", 32, 0.0, plain, plain)
    originals = [layer.weight.detach().clone() for layer in layers]
    n = sum(weight.numel() for weight in originals)
    norm = math.sqrt(sum(float(weight.double().square().sum()) for weight in originals))
    for name, form in FORMATS.items():
        for blocksize in sizes:
            bits = error = 0.0
            for layer, weight in zip(layers, originals, strict=True):
                rounded = form(weight, blocksize)
                layer.weight.data.copy_(rounded.weight)
                bits += rounded.bits * weight.numel() / n
                error += float((rounded.weight - weight).double().square().sum())
            losses = row_losses(model, rows) if has_perplexity(which, name, blocksize) else None
            yield _row(which, name, blocksize, bits, math.sqrt(error) / norm, losses, plain)


def _row(
    which: str, name: str, blocksize: int | str, bits: float, error: float, losses: Tensor | None = None,
    plain: Tensor | None = None,
) -> dict[str, Any]:  # fmt: skip
    """losses, plain: mean nll of each row of text, in this format and in fp32; what is between them has an error."""
    row = {"weights": which, "format": name, "blocksize": blocksize, "bits": round(bits, 4), "error": round(error, 6)}
    if losses is None or plain is None:
        return row | {"perplexity": "", "nll": "", "more nll": "", "standard error": ""}
    more = losses - plain
    numbers = {"perplexity": float(losses.mean().exp()), "nll": float(losses.mean()), "more nll": float(more.mean())}
    numbers["standard error"] = float(more.std()) / math.sqrt(len(more))
    return row | {field: round(value, 5) for field, value in numbers.items()}


def run(which: str, quick: bool) -> list[dict[str, Any]]:
    """The rows of one kind of weights."""
    sizes = BLOCKSIZES[:2] if quick else BLOCKSIZES
    if which == "gaussian":
        return list(gaussian(64 if quick else 2048, sizes))
    if which == "small":
        model = untrained() if quick else small_model()
        return list(of_model("small", model, split()[1][: 2 if quick else None], sizes))
    ids = load_tokenizer("smollm2-135m").encode(reference(), parse_special=False)
    rows = rows_of(ids, SMOLLM2_LENGTH, SMOLLM2_ROWS)
    return list(of_model("smollm2", load_model("smollm2-135m", dtype=torch.float32), rows, sizes))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", choices=KINDS, help="all kinds, unless named")
    parser.add_argument("--quick", action="store_true", help="without smollm2 and on little text, to see that it runs")
    args = parser.parse_args(argv)
    rows = [row for which in args.weights or (KINDS[:2] if args.quick else KINDS) for row in run(which, args.quick)]
    publish("formats", rows, key="weights", tables=tables, draw=draw, panels=(2, 3), quick=args.quick)


def tables(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    return {"error": _errors(rows), "perplexity": _perplexities(rows)}


def _errors(rows: Rows) -> list[dict[str, Any]]:
    """A line for each kind of weights and format, a column for each block size."""
    lines = []
    for which in KINDS:
        for name in FORMATS:
            of = {int(r["blocksize"]): r["error"] for r in rows if r["weights"] == which and r["format"] == name}
            if of:
                sizes = {str(size): f"{float(of[size]):.4f}" if size in of else "" for size in BLOCKSIZES}
                lines.append({"weights": which, "format": name} | sizes)
    return lines


def _perplexities(rows: Rows) -> list[dict[str, Any]]:
    """Those that were measured on smollm2, and the same of small; the CSV has the others of small."""
    lines = []
    for row in rows:
        shown = row["format"] == "fp32" or has_perplexity("smollm2", row["format"], int(row["blocksize"]))
        if row["perplexity"] and shown:
            more = (
                "" if row["format"] == "fp32" else f"{float(row['more nll']):.4f} ± {float(row['standard error']):.4f}"
            )
            line = {field: row[field] for field in ("weights", "format", "blocksize", "bits")}
            lines.append(line | {"perplexity": f"{float(row['perplexity']):.4f}", "more nll": more})
    return lines


def draw(axes: list[Any], rows: Rows) -> None:
    """Error over bits; NF4's error and affine INT4's over block size; nll over bits."""
    for ax, which in zip(axes[:3], KINDS, strict=True):
        _curves(ax, rows, which, "error")
        ax.set(title=which, xlabel="bits a weight", ylabel="‖ŵ - w‖ / ‖w‖", yscale="log")
    for which in KINDS:
        of = {(r["format"], r["blocksize"]): float(r["error"]) for r in rows if r["weights"] == which}
        sizes = [size for size in BLOCKSIZES if ("NF4", str(size)) in of]
        ratios = [of["affine INT4", str(size)] / of["NF4", str(size)] for size in sizes]
        axes[3].plot(sizes, ratios, "o-", label=which)
    axes[3].axhline(1, color="black", linewidth=0.8)
    axes[3].set(title="affine INT4's error over NF4's", xlabel="blocksize", xscale="log")
    axes[3].set_xticks(BLOCKSIZES, [str(size) for size in BLOCKSIZES])
    for ax, which in zip(axes[4:], KINDS[1:], strict=True):
        _curves(ax, rows, which, "more nll")
        ax.set(title=which, xlabel="bits a weight", ylabel="nll more than fp32, nats")
    for ax in axes:
        ax.grid(alpha=0.3)
    axes[2].legend(*axes[0].get_legend_handles_labels(), fontsize="small")
    axes[3].legend()


def _curves(ax: Any, rows: Rows, which: str, field: str) -> None:
    for i, name in enumerate(FORMATS):
        of = [row for row in rows if row["weights"] == which and row["format"] == name and row[field]]
        of = [row for row in of if float(row[field]) or field != "error"]  # 0 has no place on a log scale
        if of and name not in ("FP4, double", "INT4, double"):  # as NF4's: the same height, further left
            bits, values = [float(row["bits"]) for row in of], [float(row[field]) for row in of]
            ax.plot(bits, values, marker="o", markersize=3, color=f"C{i}" if i < 10 else "black", label=name)


if __name__ == "__main__":
    main()
