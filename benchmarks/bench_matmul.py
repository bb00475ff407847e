"""Products with a 4-bit weight: ours and bitsandbytes, beside torch with the same weight dense.

forward          y = x · Ŵᵀ
forward and dx   and dx = dy · Ŵ after it; bitsandbytes' is what its backward does, dy @ dequantize_4bit(W)

A time is that of one product in a pass over `--weights` weights of one shape, one after another as in a model: more
than the caches hold. One product before it is untimed, and wakes the threads: alone, after the other arms', a call at
M = 1 is a quarter Python, whose code has left the caches.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from benchmarks.common import (
    DTYPES,
    bnb_weight,
    check_accuracy,
    parser,
    rows_of,
    shapes_of,
    take_turns,
)
from benchmarks.results import write_rows
from kernels.dispatch import backend_for, implementation
from quant import QuantizedTensor


def main() -> None:
    flags = parser(__doc__ or "", shapes="4096x4096")
    flags.add_argument("--rows", default="1,8,64,512", help="M: rows of x")
    flags.add_argument("--passes", default="forward,forward and dx")
    flags.add_argument("--weights", type=int, default=8, help="that a pass goes over")
    args = flags.parse_args()
    dtype = DTYPES[args.dtype]
    rows = []
    for N, K in shapes_of(args.shapes):
        qs = [kernels.quantize(torch.randn(N, K), double_quant=not args.no_double_quant) for _ in range(args.weights)]
        layers = [products(q, kernels.dequantize(q, dtype), args.no_peer) for q in qs]
        for M in map(int, args.rows.split(",")):
            x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
            gate(x, dy, qs[0])
            for passes in args.passes.split(","):
                arms = {name: a_pass([layer[name] for layer in layers], x, dy, passes) for name in layers[0]}
                first = {name: a_pass([layers[-1][name]], x, dy, passes) for name in arms}
                times = take_turns(arms, args.rounds, before=first)
                each = {name: [t / len(layers) for t in taken] for name, taken in times.items()}
                double_quant = qs[0].double_quant
                case = {"M": M, "N": N, "K": K, "dtype": args.dtype, "double_quant": double_quant, "passes": passes}
                rows += rows_of(case, each, "dense torch")
    write_rows("matmul", rows, key="key")


Product = Callable[[Tensor], Any]


def products(q: QuantizedTensor, weight: Tensor, no_peer: bool) -> dict[str, tuple[Product, Product]]:
    """Forward and dx of every arm."""
    dx = implementation("matmul_dx", backend_for("matmul_dx", weight.device, weight[:1], q))
    arms: dict[str, tuple[Product, Product]] = {
        "dense torch": (lambda x: F.linear(x, weight), lambda dy: dy @ weight),
        "ours": (lambda x: kernels.matmul(x, q), lambda dy: dx(dy, q)),
    }
    if not no_peer:
        import bitsandbytes
        from bitsandbytes import functional

        packed, state = bnb_weight(q)
        state.dtype = weight.dtype
        arms["bitsandbytes"] = (
            lambda x: bitsandbytes.matmul_4bit(x, packed.t(), state),
            lambda dy: dy @ functional.dequantize_4bit(packed, state),
        )
    return arms


def a_pass(layers: list[tuple[Product, Product]], x: Tensor, dy: Tensor, passes: str) -> Callable[[], None]:
    """Every layer's product of the same x, and of dy where `passes` asks for it."""

    def run() -> None:
        with torch.no_grad():
            for forward, dx in layers:
                forward(x)
                if passes == "forward and dx":
                    dx(dy)

    return run


def gate(x: Tensor, dy: Tensor, q: QuantizedTensor) -> None:
    """Products must be as accurate as torch's own in the same dtype."""
    leaf = x.clone().requires_grad_()
    y = kernels.matmul(leaf, q)
    y.backward(dy)
    weight = kernels.dequantize(q, torch.float32)
    plain = F.linear(x, weight.to(x.dtype)), dy @ weight.to(x.dtype)
    exact = x.double() @ weight.double().T, dy.double() @ weight.double()
    assert leaf.grad is not None
    for name, ours, torchs, value in zip(("y", "dx"), (y.detach(), leaf.grad), plain, exact, strict=True):
        check_accuracy(ours, torchs, value, f"{name} of {tuple(x.shape)} by {q.shape}")


if __name__ == "__main__":
    main()
