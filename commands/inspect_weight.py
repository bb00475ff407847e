"""qlora inspect weight: one block of one weight, from floats to bytes and back, with every number on the way.

    w  ──÷ absmax──▶  s  ──nearest level──▶  code  ──two a byte──▶  byte  ──▶  level · absmax  =  ŵ

and, with double quantization, the same for the block's absmax. Then the whole weight: what the codes hold, and what is
lost by the way. A weight that is stored in 4 bits has no floats to start from: it is read back from its bytes.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from models.load import load_weight
from quant import QuantizedTensor, dequantize, quantize
from quant.blockwise import unpack


@dataclass(frozen=True)
class InspectWeightArgs:
    """Walk one block of a weight from floats to bytes and back."""

    model: Annotated[str, tyro.conf.Positional]
    """Built-in name, Hugging Face folder, .gguf file, or hub id."""
    layer: Annotated[str, tyro.conf.Positional]
    """Path of a linear layer, or its end: layers.3.mlp.up_proj"""
    block: int = 0
    """Which block of consecutive weights."""
    show: int = 8
    """How many of its weights."""
    quant_type: Literal["nf4", "fp4", "int4"] = "nf4"
    """The 16 levels."""
    blocksize: int = 64
    """Weights that share one scale."""
    double_quant: bool = True
    """Quantize the scales too."""
    plot: str | None = None
    """Draw a picture here, a PNG: where the weights lie among the levels, and each block's error."""


@dataclass(frozen=True)
class Block:
    """One block on its way. n weights; all fp32 (n,) unless said otherwise."""

    weights: Tensor | None
    """None where the model has codes alone"""
    absmax: float
    """as it was measured; of stored codes, as it was stored"""
    stored_absmax: float
    """as dequantization sees it: the same, or after its own quantization"""
    indices: Tensor
    """uint8 (n,)"""
    levels: Tensor
    back: Tensor

    scaled: Tensor | None
    """w · (1 / absmax)"""


def walk(weight: Tensor | None, q: QuantizedTensor, number: int) -> Block:
    """Block `number` of a weight (or None) and its quantized form. Raises ValueError for a block it does not have."""
    if not 0 <= number < q.n_blocks:
        raise ValueError(f"--block must lie between 0 and {q.n_blocks - 1}, got {number}")
    place = slice(number * q.blocksize, min((number + 1) * q.blocksize, q.numel))
    indices = unpack(q.packed, q.numel)[place]
    stored = q.scales()[number]
    floats = None if weight is None else weight.flatten()[place]
    absmax = float(stored) if floats is None else float(floats.abs().max())
    levels = q.code[indices.int()]
    scaled = None if floats is None else floats * (1 / floats.abs().max())
    return Block(floats, absmax, float(stored), indices, levels, levels * stored, scaled)


def run(args: InspectWeightArgs) -> None:
    path, held = load_weight(args.model, args.layer)
    if isinstance(held, QuantizedTensor):
        weight, q = None, held
    else:
        weight = held
        q = quantize(weight, quant_type=args.quant_type, blocksize=args.blocksize, double_quant=args.double_quant)
    block = walk(weight, q, args.block)
    shape = " × ".join(map(str, q.shape))
    print(f"{path}: {shape}, {q.quant_type}, {q.n_blocks:,} blocks of {q.blocksize}, {q.bits_per_param:.3f} bits each")
    for line in [*weight_lines(block, q, args), *scale_lines(block, q, args.block), *whole_lines(weight, q)]:
        print(line)
    if args.plot is not None:
        draw(weight, q, Path(args.plot))
        print(f"drawn: {args.plot}")


def weight_lines(block: Block, q: QuantizedTensor, args: InspectWeightArgs) -> list[str]:
    """The first weights of the block, a line each."""
    said = [f"{'at':>8} {'w':>10} {'s = w/absmax':>13} {'code':>9} {'level':>10}  {'byte':9} {'ŵ':>10} {'ŵ - w':>10}"]
    for i in range(min(args.show, len(block.indices))):
        at, index = args.block * q.blocksize + i, int(block.indices[i])
        byte = f"{int(q.packed[at // 2]):08b}"
        w = s = error = ""
        if block.weights is not None and block.scaled is not None:
            w, s = f"{float(block.weights[i]):+.6f}", f"{float(block.scaled[i]):+.6f}"
            error = f"{float(block.back[i] - block.weights[i]):+.6f}"
        said.append(
            f"{at:>8} {w:>10} {s:>13} {index:>2} = {index:04b} {float(block.levels[i]):>+10.6f}  "
            f"{byte[:4] + ' ' + byte[4:] if at % 2 == 0 else '':9} {float(block.back[i]):>+10.6f} {error:>10}"
        )
    return said


def scale_lines(block: Block, q: QuantizedTensor, number: int) -> list[str]:
    """The block's absmax, and its own way through 8 bits."""
    if not q.double_quant:
        return [f"absmax {block.absmax:.6f}, stored as 32 bits"]
    parts = q.tensors()
    offset, index = float(parts["absmax_offset"]), int(parts["absmax_8bit"][number])
    absmax2 = float(parts["absmax2"][number // q.blocksize2])
    level = float(parts["absmax_code"][index])
    return [
        f"absmax {block.absmax:.6f} - mean {offset:.6f} = {block.absmax - offset:+.6f}, the largest of its "
        f"{q.blocksize2} scales ±{absmax2:.6f}: {(block.absmax - offset) / absmax2 if absmax2 else 0.0:+.6f}",
        f"nearest of 256 levels: byte {index}, {level:+.6f}; back: {level:+.6f} · {absmax2:.6f} + {offset:.6f} = "
        f"{block.stored_absmax:.6f}, off by {block.stored_absmax - block.absmax:+.6f}",
    ]


def whole_lines(weight: Tensor | None, q: QuantizedTensor) -> list[str]:
    """How often each code comes, and what the whole weight lost."""
    counts = torch.bincount(unpack(q.packed, q.numel).int(), minlength=len(q.code)) / q.numel
    said = ["codes: " + " ".join(f"{i}:{share:.1%}" for i, share in enumerate(counts.tolist()))]
    if weight is None:
        return said
    error, size = dequantize(q, torch.float32) - weight, float(weight.norm())
    lost, largest = float(error.norm()) / size, float(error.abs().max())
    said.append(f"whole weight: ‖ŵ - w‖ / ‖w‖ = {lost:.4%}, largest error {largest:.6f}")
    if q.double_quant:
        plain = replace(q, absmax=_measured(weight, q.blocksize), absmax_8bit=None, absmax_code=None, absmax2=None)
        plain = replace(plain, absmax_offset=None)
        without = float((dequantize(plain, torch.float32) - weight).norm()) / size
        said.append(f"with scales in 32 bits it would be {without:.4%}, at {plain.bits_per_param:.3f} bits each")
    return said


def _measured(weight: Tensor, blocksize: int) -> Tensor:
    """absmax of every block, as it was before its own quantization."""
    flat = weight.flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % blocksize)).view(-1, blocksize).abs().amax(1)


def draw(weight: Tensor | None, q: QuantizedTensor, path: Path) -> None:
    """Histogram of s over the levels, or of the codes alone; each block's error. ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: install the extra `plot`") from None
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    if weight is None:
        left.hist(q.code[unpack(q.packed, q.numel).int()].numpy(), bins=201, label="stored levels")
        right.hist(q.scales().numpy(), bins=100)
        right.set(xlabel="absmax", ylabel="blocks")
    else:
        scales = _measured(weight, q.blocksize)
        per_weight = scales.repeat_interleave(q.blocksize)[: q.numel]
        left.hist((weight.flatten() / per_weight.clamp_min(1e-30)).numpy(), bins=201, label="s = w / absmax")
        error = (dequantize(q, torch.float32) - weight).flatten()
        blocks = torch.nn.functional.pad(error, (0, -q.numel % q.blocksize)).view(-1, q.blocksize)
        right.plot(scales.numpy(), blocks.square().mean(1).sqrt().numpy(), ".", markersize=1)
        right.set(xlabel="absmax of the block", ylabel="root mean square error of the block")
    for level in q.code.tolist():
        left.axvline(level, color="black", linewidth=0.5)
    left.set(xlabel=f"s, and the {len(q.code)} levels of {q.quant_type}", ylabel="weights")
    left.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=120, format="png")
    os.replace(temporary, path)
