"""Products with a 4-bit weight: ours and bitsandbytes, beside torch with the same weight dense.

forward          y = x · Ŵᵀ
forward and dx   and dx = dy · Ŵ after it; bitsandbytes' is what its backward does, dy @ dequantize_4bit(W)
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
    args = flags.parse_args()
    dtype = DTYPES[args.dtype]
    rows = []
    for N, K in shapes_of(args.shapes):
        q = kernels.quantize(torch.randn(N, K), double_quant=not args.no_double_quant)
        weight = kernels.dequantize(q, dtype)
        for M in map(int, args.rows.split(",")):
            x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
            gate(x, dy, q)
            for passes in args.passes.split(","):
                arms = {
                    name: both(forward, dx, x, dy) if passes == "forward and dx" else with_no_grad(forward, x)
                    for name, (forward, dx) in products(q, weight, args.no_peer).items()
                }
                case = {"M": M, "N": N, "K": K, "dtype": args.dtype, "double_quant": q.double_quant, "passes": passes}
                rows += rows_of(case, take_turns(arms, args.rounds), "dense torch")
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


def with_no_grad(forward: Product, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            forward(x)

    return run


def both(forward: Product, dx: Product, x: Tensor, dy: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            forward(x)
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
