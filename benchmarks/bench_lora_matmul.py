"""A 4-bit layer with a LoRA adapter: ours, and PEFT's layer over bitsandbytes', beside the same over a dense weight.

    forward                 y = x · Ŵᵀ + s · (x · Aᵀ) · Bᵀ
    forward and backward    and dx, dA and dB after it

"dense torch" adds the adapter's product to F.linear, as PEFT does. Ours has the two in one product (docs/equations.md).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from benchmarks.common import DTYPES, bnb_weight, check_accuracy, parser, rows_of, shapes_of, take_turns
from benchmarks.results import write_rows
from kernels import LoRATerm
from quant import QuantizedTensor

BASE = "dense torch"
PEER = "peft + bitsandbytes"
SCALING = 1.0  # alpha = r
Layer = Callable[[Tensor], Tensor]


def main() -> None:
    flags = parser(__doc__ or "", shapes="4096x4096")
    flags.add_argument("--rows", default="1,64,512", help="M: rows of x")
    flags.add_argument("--rank", type=int, default=16)
    flags.add_argument("--passes", default="forward,forward and backward")
    args = flags.parse_args()
    dtype = DTYPES[args.dtype]
    rows = []
    for N, K in shapes_of(args.shapes):
        q = kernels.quantize(torch.randn(N, K), double_quant=not args.no_double_quant)
        A, B = torch.randn(args.rank, K) / K**0.5, torch.randn(N, args.rank)
        layers = layers_of(q, A, B, dtype, args.no_peer)
        for M in map(int, args.rows.split(",")):
            x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
            gate(layers, x, dy, q, A, B)
            for passes in args.passes.split(","):
                arms = {
                    name: with_backward(layer, adapter, x, dy) if "backward" in passes else with_no_grad(layer, x)
                    for name, (layer, adapter) in layers.items()
                }
                case = {"M": M, "N": N, "K": K, "r": args.rank, "dtype": args.dtype, "double_quant": q.double_quant}
                times = take_turns(arms, args.rounds)
                rows += rows_of(case | {"passes": passes}, times, BASE, ("peft", "bitsandbytes"))
    write_rows("lora_matmul", rows, key="key")


def layers_of(
    q: QuantizedTensor, A: Tensor, B: Tensor, dtype: torch.dtype, no_peer: bool
) -> dict[str, tuple[Layer, list[Tensor]]]:
    """Every arm: its layer, and the A (r, K) and B (N, r) that it trains, fp32 each."""
    weight = kernels.dequantize(q, dtype)
    pairs = [[t.clone().requires_grad_() for t in (A, B)] for _ in range(2)]

    def dense(x: Tensor) -> Tensor:
        a, b = pairs[0]
        return F.linear(x, weight) + SCALING * F.linear(F.linear(x, a.to(dtype)), b.to(dtype))

    def ours(x: Tensor) -> Tensor:
        return kernels.lora_matmul(x, q, [LoRATerm(*pairs[1], SCALING)])

    arms: dict[str, tuple[Layer, list[Tensor]]] = {BASE: (dense, pairs[0]), "ours": (ours, pairs[1])}
    if not no_peer:
        layer = peft_layer(q, A, B, dtype)
        arms[PEER] = (layer, [p for p in layer.parameters() if p.requires_grad])
    return arms


def peft_layer(q: QuantizedTensor, A: Tensor, B: Tensor, dtype: torch.dtype) -> torch.nn.Module:
    """PEFT's LoRA layer over bitsandbytes' layer of the same bytes."""
    import bitsandbytes
    from peft import LoraConfig
    from peft.tuners.lora.bnb import Linear4bit

    N, K = q.shape
    packed, state = bnb_weight(q)
    state.dtype = dtype
    base = bitsandbytes.nn.Linear4bit(K, N, bias=False, compute_dtype=dtype, quant_type=q.quant_type)
    base.weight = bitsandbytes.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, bnb_quantized=True, module=base
    )
    base.quant_state = state
    r = len(A)
    layer: torch.nn.Module = Linear4bit(base, "default", config=LoraConfig(r=r, lora_alpha=r), r=r, lora_alpha=r)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(A)  # type: ignore[index, union-attr, operator]
        layer.lora_B["default"].weight.copy_(B)  # type: ignore[index, union-attr, operator]
    return layer


def with_no_grad(layer: Layer, x: Tensor) -> Callable[[], Any]:
    def run() -> None:
        with torch.no_grad():
            layer(x)

    return run


def with_backward(layer: Layer, adapter: list[Tensor], x: Tensor, dy: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """y, dx, dA and dB."""

    def run() -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        y = layer(leaf)
        return y, *torch.autograd.grad(y, [leaf, *adapter], dy)

    return run


def gate(
    layers: dict[str, tuple[Layer, list[Tensor]]], x: Tensor, dy: Tensor, q: QuantizedTensor, A: Tensor, B: Tensor
) -> None:
    """Ours must be as accurate as torch's in the same dtype, and the peer must compute the same thing."""
    leaves = [t.double().requires_grad_() for t in (x, A, B)]
    exact_y = leaves[0] @ kernels.dequantize(q, torch.float64).T + SCALING * leaves[0] @ leaves[1].T @ leaves[2].T
    exact = [exact_y.detach(), *torch.autograd.grad(exact_y, leaves, dy.double())]
    results = {name: with_backward(layer, adapter, x, dy)() for name, (layer, adapter) in layers.items()}
    for i, value in enumerate(("y", "dx", "dA", "dB")):
        what = f"{value} of {tuple(x.shape)} by {q.shape}"
        check_accuracy(results["ours"][i], results[BASE][i], exact[i], what)
        if PEER in results:
            check_accuracy(results[PEER][i], results[BASE][i], exact[i], f"{PEER}: {what}")


if __name__ == "__main__":
    main()
