"""qlora inspect model: what a model is made of, and the bytes each part holds."""

import re
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from torch import nn

from lora import LinearNF4, count_parameters

from .loaded import ModelArgs, load


@dataclass(frozen=True)
class InspectModelArgs(ModelArgs):
    """Show the layers of a model and the bytes they hold. Try --quantize nf4."""


@dataclass
class Part:
    """Tensors of one kind: the same path in every layer."""

    kind: str
    shape: tuple[int, ...]
    count: int = 0
    numel: int = 0
    nbytes: int = 0


def run(args: InspectModelArgs) -> None:
    model, tokenizer = load(args)
    parts = model_parts(model)
    table = Table("part", "shape", "how many", "held as", "parameters", "MB", "bits/param")
    for name, part in parts.items():
        bits = f"{8 * part.nbytes / part.numel:.3f}"
        shape = " × ".join(map(str, part.shape))
        table.add_row(name, shape, str(part.count), part.kind, f"{part.numel:,}", f"{part.nbytes / 1e6:.2f}", bits)
    console = Console()
    console.print(table, markup=False)
    trainable, total = count_parameters(model)
    nbytes = sum(part.nbytes for part in parts.values())
    print(f"{total:,} parameters in {nbytes / 1e6:.1f} MB; {trainable:,} trainable; {tokenizer.vocab_size:,} tokens")


def model_parts(model: nn.Module) -> dict[str, Part]:
    """Every tensor of the model, once, under its path with the layer number left out."""
    parts: dict[str, Part] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, LinearNF4):
            q = module.quantized
            kind = f"{q.quant_type}, blocks of {q.blocksize}" + (", double-quantized" if q.double_quant else "")
            _add(parts, f"{path}.weight", kind, q.shape, q.numel, q.nbytes)
            seen |= {id(p) for name, p in module.named_parameters() if name != "bias"}
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                kind = str(parameter.dtype).removeprefix("torch.")
                _add(parts, name, kind, tuple(parameter.shape), parameter.numel(), parameter.nbytes)
    return parts


def _add(parts: dict[str, Part], path: str, kind: str, shape: tuple[int, ...], numel: int, nbytes: int) -> None:
    part = parts.setdefault(re.sub(r"\.\d+\.", ".*.", path), Part(kind, shape))
    part.count, part.numel, part.nbytes = part.count + 1, part.numel + numel, part.nbytes + nbytes
