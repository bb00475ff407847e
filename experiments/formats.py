"""4-bit formats: what each loses, in the weights and in perplexity. docs/experiments/formats.md reads the result.

    python -m experiments.formats            (qlora experiment formats)

Formats: NF4, FP4, symmetric INT4 (k/7), affine INT4 (scale and minimum of each block in fp16, as llama.cpp's Q4_1),
NF3, NF5. Block sizes 32 to 1024; absmax in 32 bits, or double-quantized. Every bit is counted.

Weights: N(0, 1), which NF4 is made for; a small model trained here, never rounded before; SmolLM2, whose weights come
from Q4_1 blocks of 32. Those lie on affine INT4's levels exactly, so its figures at 32 on SmolLM2 say nothing.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import kernels
from lora.attach import HEAD
from models import Decoder, load_model, load_tokenizer
from quant import dequantize, quantize

from .pages import publish
from .small_model import small_model, split
from .text import perplexity, reference, rows_of

BLOCKSIZES = (32, 64, 128, 256, 512, 1024)


class Rounded(NamedTuple):
    weight: Tensor
    bits: float
    """a weight, scales included"""


def affine_int4(weight: Tensor, blocksize: int) -> Rounded:
    """ŵ = q · scale + minimum, q = 0 … 15, scale = (maximum - minimum) / 15; both of a block in fp16."""
    blocks = weight.reshape(-1, blocksize)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    minimum, scale = low.half().float(), ((high - low) / 15).half().float()
    q = ((blocks - minimum) / scale.clamp_min(1e-30)).round().clamp(0, 15)
    return Rounded((q * scale + minimum).view_as(weight), 4 + 32 / blocksize)


def by_code(quant_type: str, double_quant: bool) -> Callable[[Tensor, int], Rounded]:
    """Through quantize and dequantize; the bits of a code are counted as if they were packed."""

    def rounded(weight: Tensor, blocksize: int) -> Rounded:
        run, back = (kernels.quantize, kernels.dequantize) if quant_type in ("nf4", "fp4") else (quantize, dequantize)
        q = run(weight, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant)
        code_bits = len(q.code).bit_length() - 1
        return Rounded(back(q, torch.float32), code_bits + 8 * (q.nbytes - q.packed.nbytes) / q.numel)

    return rounded


Score = Callable[[dict[str, Tensor]], float]

FORMATS: dict[str, Callable[[Tensor, int], Rounded]] = {
    "NF4": by_code("nf4", False),
    "NF4, double": by_code("nf4", True),
    "FP4": by_code("fp4", False),
    "INT4": by_code("int4", False),
    "affine INT4": affine_int4,
    "NF3": by_code("nf3", False),
    "NF5": by_code("nf5", False),
}


def measured(
    weights: dict[str, Tensor], score: Callable[[dict[str, Tensor]], float] | None
) -> Iterator[dict[str, Any]]:
    """A row for each format and block size over these weights; score gives a perplexity with others in their place."""
    size = sum(float(w.double().square().sum()) for w in weights.values())
    for name, form in FORMATS.items():
        for blocksize in BLOCKSIZES:
            rounded = {path: form(w, blocksize) for path, w in weights.items()}
            error = sum(float((r.weight - weights[path]).double().square().sum()) for path, r in rounded.items())
            n = sum(w.numel() for w in weights.values())
            bits = sum(r.bits * weights[path].numel() for path, r in rounded.items()) / n
            found = score({path: r.weight for path, r in rounded.items()}) if score else None
            yield {
                "format": name,
                "blocksize": blocksize,
                "bits": round(bits, 4),
                "error": round((error / size) ** 0.5, 6),
                "perplexity": "" if found is None else round(found, 4),
            }


def linear_weights(model: Decoder) -> dict[str, nn.Linear]:
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) and path != HEAD}


def of_model(model: Decoder, rows: list[list[int]]) -> Iterator[dict[str, Any]]:
    """The model as it is, then with its linear layers in each format; the head and embeddings stay."""
    layers = linear_weights(model)
    weights = {path: layer.weight.detach().clone() for path, layer in layers.items()}

    def score(replaced: dict[str, Tensor]) -> float:
        for path, weight in replaced.items():
            layers[path].weight.data.copy_(weight)
        return perplexity(model, rows)

    plain = perplexity(model, rows)
    yield {"format": "fp32", "blocksize": "", "bits": 32, "error": 0.0, "perplexity": round(plain, 4)}
    yield from measured(weights, score)


def run(which: str, n_rows: int) -> list[dict[str, Any]]:
    """The rows of one kind of weights: gaussian, small or smollm2."""
    if which == "gaussian":
        torch.manual_seed(0)
        return list(measured({"w": torch.randn(2048, 2048)}, None))
    if which == "small":
        return list(of_model(small_model(), split()[1][:n_rows]))
    ids = load_tokenizer("smollm2-135m").encode(reference(), parse_special=False)
    return list(of_model(load_model("smollm2-135m", dtype=torch.float32), rows_of(ids, 256, n_rows // 4)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--rows", type=int, default=64, help="held-out rows of 128 bytes, or a quarter of 256 tokens")
    args = parser.parse_args()
    for which in args.weights:
        publish("formats", [{"weights": which, **row} for row in run(which, args.rows)], key="weights", draw=draw)


KINDS = ["gaussian", "small", "smollm2"]


def draw(axes: list[Any], rows: list[dict[str, str]]) -> None:
    """Error over bits for each kind of weights."""
    for ax, which in zip(axes, KINDS, strict=True):
        for name in FORMATS:
            of = [row for row in rows if row["weights"] == which and row["format"] == name]
            if of:
                ax.plot(
                    [float(r["bits"]) for r in of],
                    [float(r["error"]) for r in of],
                    marker="o",
                    markersize=3,
                    label=name,
                )
        ax.set(title=which, xlabel="bits a weight", ylabel="‖ŵ - w‖ / ‖w‖", yscale="log")
        ax.grid(alpha=0.3)
    axes[0].legend()


if __name__ == "__main__":
    main()
