"""What `qlora bench gpu` times: each operation, by each arm, on one case, and the check that must pass before.

    quantize        ours, bitsandbytes
    dequantize      copy (writes as many bytes, the least it can cost), ours, bitsandbytes
    forward, dx     dense, dequantize + torch.matmul, ours, bitsandbytes
    lora            the layer with an adapter of r = 16, forward and backward: as forward
    cross-entropy   dense (F.cross_entropy on the logits of all rows), ours, ours with a 4-bit head

Every arm gets the same bytes, from the same seed. Ours is what the package does by itself: its autotuned choice. The
check: on a few rows and columns, as near to float64 as twice plain PyTorch's error in the same dtype, or, for quantize
and dequantize, to the bit on the first rows. Nothing here needs a GPU: the tests run it on a CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
import quant
from benchmarks.common import bnb_weight, check_accuracy
from kernels import LoRATerm
from kernels.dispatch import backend_for, implementation
from quant import QuantizedTensor

COPY, DENSE, COMPOSED, OURS, FOUR_BIT, BNB = (
    "copy", "dense", "dequantize + torch.matmul", "ours", "ours, 4-bit head", "bitsandbytes",
)  # fmt: skip
ARMS = {
    "quantize": (OURS, BNB),
    "dequantize": (COPY, OURS, BNB),
    "forward": (DENSE, COMPOSED, OURS, BNB),
    "dx": (DENSE, COMPOSED, OURS, BNB),
    "lora": (DENSE, COMPOSED, OURS, BNB),
    "cross-entropy": (DENSE, OURS, FOUR_BIT),
}
"""The arms of each operation; times are compared with the first."""
RANK = 16
CHECKED = 64  # rows and columns of a result that the check reads, at most
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    op: str
    model: str
    layer: str
    N: int
    """out_features, or the vocabulary"""
    K: int
    M: int
    """rows of activations, 0 where there are none"""
    double_quant: bool
    dtype: str


@dataclass(frozen=True)
class Arm:
    run: Callable[[], Any]
    check: Callable[[], None]
    """Raises ValueError where the result is wrong"""
    choice: Callable[[], str] = lambda: ""
    """What autotune chose, once it has run"""


def arm_of(name: str, case: Case, device: torch.device) -> Arm:
    """Everything is made here, so that `run` is the operation alone."""
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    weight = torch.randn(case.N, case.K, device=device, dtype=dtype) * case.K**-0.5
    if case.op == "quantize":
        return _quantize(name, weight, case.double_quant)
    if case.op == "cross-entropy":
        return _cross_entropy(name, weight, case.M)
    q = kernels.quantize(weight, double_quant=case.double_quant)
    if case.op == "dequantize":
        return _dequantize(name, q, weight)
    x, dy = (torch.randn(case.M, size, device=device, dtype=dtype) for size in (case.K, case.N))
    if case.op == "lora":
        return _lora(name, q, x, dy)
    return _product(name, case.op, q, x if case.op == "forward" else dy)


def _quantize(name: str, weight: Tensor, double_quant: bool) -> Arm:
    def ours(w: Tensor) -> QuantizedTensor:
        return kernels.quantize(w, double_quant=double_quant)

    def check() -> None:
        expected, found = quant.quantize(weight[:CHECKED], double_quant=double_quant), ours(weight[:CHECKED])
        if any(not torch.equal(t, found.tensors()[key]) for key, t in expected.tensors().items()):
            raise ValueError("quantize differs from the definition")

    if name == OURS:
        return Arm(lambda: ours(weight), check)
    from bitsandbytes import functional

    options = {"quant_type": "nf4", "blocksize": 64, "compress_statistics": double_quant}
    return Arm(lambda: functional.quantize_4bit(weight, **options), lambda: None)


def _dequantize(name: str, q: QuantizedTensor, weight: Tensor) -> Arm:
    if name == COPY:
        out = torch.empty_like(weight)
        return Arm(lambda: out.copy_(weight), lambda: None)
    if name == OURS:

        def check() -> None:
            first = kernels.quantize(weight[:CHECKED], double_quant=q.double_quant)
            if not torch.equal(kernels.dequantize(first, weight.dtype), quant.dequantize(first, weight.dtype)):
                raise ValueError("dequantize differs from the definition")

        return Arm(lambda: kernels.dequantize(q, weight.dtype), check)
    theirs = _bnb(q, weight.dtype)

    def check_theirs() -> None:
        if not torch.equal(theirs.dequantize()[:CHECKED], kernels.dequantize(q, weight.dtype)[:CHECKED]):
            raise ValueError("bitsandbytes' dequantize differs")

    return Arm(theirs.dequantize, check_theirs)


@dataclass(frozen=True)
class _Bitsandbytes:
    packed: Tensor
    state: Any

    def dequantize(self) -> Tensor:
        from bitsandbytes import functional

        return functional.dequantize_4bit(self.packed, self.state)

    def matmul(self, x: Tensor) -> Tensor:
        import bitsandbytes

        return bitsandbytes.matmul_4bit(x, self.packed.t(), self.state)


def _bnb(q: QuantizedTensor, dtype: torch.dtype) -> _Bitsandbytes:
    packed, state = bnb_weight(q)
    state.dtype = dtype
    return _Bitsandbytes(packed, state)


def _product(name: str, op: str, q: QuantizedTensor, rows: Tensor) -> Arm:
    """rows: x (M, K) for forward, dy (M, N) for dx."""
    forward, dtype = op == "forward", rows.dtype
    if name == DENSE:
        dense = kernels.dequantize(q, dtype)
        product = (lambda: F.linear(rows, dense)) if forward else (lambda: rows @ dense)
    elif name == COMPOSED:

        def product() -> Tensor:
            weight = kernels.dequantize(q, dtype)
            return F.linear(rows, weight) if forward else rows @ weight

    elif name == OURS:
        operation = "matmul" if forward else "matmul_dx"
        ours = implementation(operation, backend_for(operation, rows.device, rows, q))
        product = (lambda: ours(rows, q, None)) if forward else (lambda: ours(rows, q))
    else:
        theirs = _bnb(q, dtype)  # its backward has no kernel of its own
        product = (lambda: theirs.matmul(rows)) if forward else (lambda: rows @ theirs.dequantize())

    def run() -> Tensor:
        with torch.no_grad():
            return product()

    def check() -> None:
        weight = kernels.dequantize(q, torch.float32)
        matrix = weight.T if forward else weight
        columns = _ends(matrix.shape[1])
        few, part = rows[:CHECKED], matrix[:, columns]
        exact = few.double() @ part.double()
        check_accuracy(run()[:CHECKED][:, columns], few @ part.to(dtype), exact, f"{name}, {op}")

    return Arm(run, check, lambda: _choice(op, rows, q) if name == OURS else "")


def _choice(op: str, rows: Tensor, q: QuantizedTensor) -> str:
    try:
        from kernels.triton import autotune
    except ImportError:  # Triton is not everywhere
        return ""
    return autotune.chosen("forward" if op == "forward" else "backward", rows, q)


def _ends(size: int) -> Tensor:
    """The first and last columns."""
    half = min(CHECKED, size) // 2
    return torch.cat([torch.arange(half), torch.arange(size - half, size)])


def _lora(name: str, q: QuantizedTensor, x: Tensor, dy: Tensor) -> Arm:
    """y, dx, dA and dB of a layer with an adapter, fp32 A and B as in training; scaling 1."""
    A = (torch.randn(RANK, x.shape[1], device=x.device) * x.shape[1] ** -0.5).requires_grad_()
    B = torch.randn(dy.shape[1], RANK, device=x.device, requires_grad=True)
    dtype, leaf = x.dtype, x.detach().requires_grad_()
    dense = kernels.dequantize(q, dtype) if name == DENSE else None
    theirs = _bnb(q, dtype) if name == BNB else None

    def layer() -> Tensor:
        if name == OURS:
            return kernels.lora_matmul(leaf, q, [LoRATerm(A, B, 1.0)])
        if theirs is not None:
            y = theirs.matmul(leaf)
        else:
            y = F.linear(leaf, kernels.dequantize(q, dtype) if dense is None else dense)
        return y + F.linear(F.linear(leaf, A.to(dtype)), B.to(dtype))

    def run() -> tuple[Tensor, ...]:
        y = layer()
        return y, *torch.autograd.grad(y, [leaf, A, B], dy)

    def check() -> None:
        y, dx, dA, dB = (t.detach() for t in run())
        weight, a, b = kernels.dequantize(q, torch.float32), A.detach(), B.detach()
        n, k = _ends(weight.shape[0]), _ends(weight.shape[1])
        for what, result, rows, base, low, up in (
            ("y", y[:CHECKED][:, n], x[:CHECKED], weight[n].T, a.T, b[n].T),
            ("dx", dx[:CHECKED][:, k], dy[:CHECKED], weight[:, k], b, a[:, k]),
        ):
            plain = rows @ base.to(dtype) + rows @ low.to(dtype) @ up.to(dtype)
            exact = rows.double() @ base.double() + rows.double() @ low.double() @ up.double()
            check_accuracy(result, plain, exact, f"{name}, lora: {what}")
        for what, result, rows, factor, columns in (
            ("dA", dA[:, k], dy, b, x[:, k]),
            ("dB", dB[n].T, x, a.T, dy[:, n]),
        ):
            low64 = torch.cat([part.double() @ factor.double() for part in rows.split(256)])
            plain = (rows @ factor.to(dtype)).T @ columns
            check_accuracy(result, plain, low64.T @ columns.double(), f"{name}, lora: {what}")

    return Arm(run, check)


def _cross_entropy(name: str, head: Tensor, M: int) -> Arm:
    """nll of M rows, and the gradient of its mean by the hidden states."""
    V, D = head.shape
    hidden = torch.randn(M, D, device=head.device, dtype=head.dtype).requires_grad_()
    targets = torch.randint(V, (M,), device=head.device)
    q = kernels.quantize(head) if name == FOUR_BIT else None
    head = head if q is None else kernels.dequantize(q, head.dtype)

    def nll_of(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        z = F.linear(x, w)
        return F.cross_entropy(z.to(torch.promote_types(z.dtype, torch.float32)), t, reduction="none")

    def run() -> tuple[Tensor, Tensor]:
        if name == DENSE:
            nll = nll_of(hidden, head, targets)
        else:
            nll = kernels.linear_cross_entropy(hidden, head if q is None else q, targets)
        return nll, torch.autograd.grad(nll.mean(), hidden)[0]

    def check() -> None:
        ours = [result.detach()[:CHECKED] for result in run()]
        x, t = hidden.detach()[:CHECKED].requires_grad_(), targets[:CHECKED]
        nll = nll_of(x, head, t)
        plain = nll.detach(), torch.autograd.grad(nll.sum() / M, x)[0]
        for what, result, theirs, exact in zip(("nll", "dx"), ours, plain, _exact(x, head, t, M), strict=True):
            check_accuracy(result, theirs, exact, f"{name}, cross-entropy: {what}")

    return Arm(run, check)


def _exact(x: Tensor, head: Tensor, targets: Tensor, M: int) -> tuple[Tensor, Tensor]:
    """nll and dx in float64, a part of the vocabulary at a time: the head in float64 may not fit."""
    wide, parts = x.detach().double(), head.split(8192)
    logps = torch.cat([wide @ part.double().T for part in parts], 1).log_softmax(1)
    dz = (logps.exp() - F.one_hot(targets, len(head))) / M
    dx = torch.zeros_like(wide)
    for columns, part in zip(dz.split(8192, dim=1), parts, strict=True):
        dx += columns @ part.double()
    return -logps.gather(1, targets[:, None]).view(-1), dx
