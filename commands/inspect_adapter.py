"""qlora inspect adapter: how much an adapter changes each layer, how much of its rank it uses, what merging would cost.

change         ‖s·BA‖ / ‖W‖, Frobenius                        by layer, and by kind of layer
rank used      exp(entropy of σ_i / Σ σ)                      the effective rank of Roy and Vetterli (2007): r where
                                                              all directions count alike, 1 where one does
merge in bf16  what rounding W + s·BA to bf16 takes back      MergeReport.weight_error: near 1, the adapter is lost
merge in nf4   the same for 4 bits
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

import kernels
from lora import LoRALinear, load_adapter
from lora.adapters import lora_layers
from lora.linear import base_weight
from models import load_model
from quant import QuantizedTensor


@dataclass(frozen=True)
class InspectAdapterArgs:
    """Show what an adapter does to each layer."""

    adapter: Annotated[str, tyro.conf.Positional]
    """Adapter folder in PEFT's format, such as runs/demo/adapter."""
    model: str = "smollm2-135m"
    """Its base: built-in name, Hugging Face folder, .gguf file, or hub id."""
    layers: bool = False
    """A line for each layer; else one for each kind of layer."""


@dataclass(frozen=True)
class Change:
    """What an adapter does to one layer. Norms are Frobenius's."""

    kind: str
    r: int
    weight: float
    delta: float
    rank_used: float
    bf16: float
    """‖rounded(W + ΔW) - (W + ΔW)‖ / ‖ΔW‖"""
    nf4: float


def run(args: InspectAdapterArgs) -> None:
    model = load_model(args.model)
    load_adapter(model, args.adapter)
    changes = {path: change(path, layer) for path, layer in lora_layers(model).items() if "default" in layer.lora_A}
    if not changes:
        raise ValueError(f"{args.adapter} has no low-rank matrices on linear layers")
    if not args.layers:
        kinds = dict.fromkeys(one.kind for one in changes.values())
        changes = {kind: mean([one for one in changes.values() if one.kind == kind]) for kind in kinds}
    first = "layer" if args.layers else "kind (mean)"
    rows = Table(first, "r", "rank used", "‖W‖", "‖ΔW‖", "change", "lost in bf16", "in nf4")
    for name, one in changes.items():
        norms = (f"{one.rank_used:.1f}", f"{one.weight:.2f}", f"{one.delta:.3f}", f"{one.delta / one.weight:.3%}")
        rows.add_row(name, str(one.r), *norms, f"{one.bf16:.1%}", f"{one.nf4:.0%}")
    Console().print(rows, markup=False)
    print("lost: what rounding takes back of the adapter when it is merged; `qlora merge --data` measures answers")


@torch.no_grad()
def change(path: str, layer: LoRALinear, name: str = "default") -> Change:
    """How adapter `name` changes one layer."""
    base = base_weight(layer.base_layer)
    W = kernels.dequantize(base, torch.float32) if isinstance(base, QuantizedTensor) else base.float()
    A, B = layer.lora_A[name].float(), layer.lora_B[name].float()
    delta = layer.scaling[name] * (B @ A)
    merged, size = W + delta, float(delta.norm())
    nf4 = kernels.dequantize(kernels.quantize(merged), torch.float32)
    return Change(
        kind=path.rpartition(".")[2],
        r=A.shape[0],
        weight=float(W.norm()),
        delta=size,
        rank_used=effective_rank(A, B),
        bf16=float((merged.bfloat16().float() - merged).norm()) / size if size else 0.0,
        nf4=float((nf4 - merged).norm()) / size if size else 0.0,
    )


def effective_rank(A: Tensor, B: Tensor) -> float:
    """exp of the entropy of B·A's singular values as shares of their sum; 0 for a zero product.

    A (r, K), B (N, r). The singular values of BA are those of the r × r product of the triangles of Bᵀ's and A's QR.
    """
    _, up = torch.linalg.qr(B.double())
    _, down = torch.linalg.qr(A.double().T)
    singular = torch.linalg.svdvals(up @ down.T)
    if float(singular.sum()) == 0:
        return 0.0
    shares = singular / singular.sum()
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


def mean(changes: list[Change]) -> Change:
    """Of several layers of one kind."""
    means = {
        field: sum(getattr(one, field) for one in changes) / len(changes)
        for field in ("weight", "delta", "rank_used", "bf16", "nf4")
    }
    return Change(kind=changes[0].kind, r=max(one.r for one in changes), **means)
