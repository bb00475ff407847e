"""Exercise 6: a QLoRA layer's gradients by hand, against kernels.lora_matmul's in float64, and what it keeps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import LoRATerm, lora_matmul, use_backend
from lessons.grading import Case, Forbidden, Mistake
from quant import QuantizedTensor, dequantize, quantize

TITLE = "the backward of y = x · Ŵᵀ + s · (x · Aᵀ) · Bᵀ, without keeping Ŵ"
VERSION = 1
MUST_NOT_USE = (
    Forbidden("kernels", "it holds what you are writing"),
    *(
        Forbidden(name, "write the products yourself")
        for name in (".autograd", ".backward", ".grad", ".requires_grad_")
    ),
)
RTOL = 1e-9  # float64 throughout: a different order of the sums is far below it, and any mistake far above

NO_SCALING_FORWARD = "the adapter is not scaled in y"
NO_BASE_DX = "dx lacks the base: x also went through Ŵ, which is frozen but not absent: dy · Ŵ"
NO_ADAPTER_DX = "dx lacks the adapter: x also went through A and B: s · (dy · B) · A"
NO_S_DX = "the adapter's part of dx is not scaled by s"
NO_S_DA = "dA is not scaled by s: y holds s · (x · Aᵀ) · Bᵀ"
NO_S_DB = "dB is not scaled by s: y holds s · (x · Aᵀ) · Bᵀ"
NO_S = "neither dA nor dB is scaled by s: y holds s · (x · Aᵀ) · Bᵀ"
MEAN = "dA and dB are divided by the number of rows: the rows' gradients are summed (a mean, if any, is in dy already)"
KEPT = "saved holds more than x and x · Aᵀ: keep q, which is there anyway, and dequantize again in backward"
Inputs = tuple[Tensor, QuantizedTensor, Tensor, Tensor, float]


def cases() -> list[Case]:
    generator = torch.Generator().manual_seed(6)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = []
    for name, M, N, K, r, s in [("M, N, K, r = 3, 8, 64, 2", 3, 8, 64, 2, 0.5), ("7, 66, 65, 4", 7, 66, 65, 4, 2.0)]:
        inputs = normal(M, K), quantize(normal(N, K).float()), normal(r, K), normal(N, r), s
        dy = normal(M, N)
        y, dx, dA, dB = reference(inputs, dy)
        plain = inputs[0] @ dequantize(inputs[1], torch.float64).T + inputs[0] @ inputs[2].T @ inputs[3].T
        found.append(
            Case(f"y, {name}", _forward(inputs), y, [Mistake(NO_SCALING_FORWARD, plain)], rtol=RTOL, atol=RTOL)
        )
        wrong = gradient_mistakes(inputs, dy, (dx, dA, dB))
        found.append(Case(f"dx, dA, dB, {name}", _gradients(inputs, dy), (dx, dA, dB), wrong, rtol=RTOL, atol=RTOL))
        limit = M * K + M * r
        found.append(Case(f"what is kept, {name}", _kept_within(inputs, limit), True, [Mistake(KEPT, False)]))
    return found


def reference(inputs: Inputs, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, q, A, B, s = inputs
    x, A, B = (t.clone().requires_grad_() for t in (x, A, B))
    with use_backend("reference"):
        y = lora_matmul(x, q, [LoRATerm(A, B, s)])
        y.backward(dy)
    return y.detach(), *(t.grad for t in (x, A, B))


def gradient_mistakes(inputs: Inputs, dy: Tensor, right: tuple[Tensor, Tensor, Tensor]) -> list[Mistake]:
    x, q, A, B, s = inputs
    dx, dA, dB = right
    through_base, through_adapter = dy @ dequantize(q, dy.dtype), s * (dy @ B @ A)
    M = len(x)
    values = [
        (NO_BASE_DX, (through_adapter, dA, dB)),
        (NO_ADAPTER_DX, (through_base, dA, dB)),
        (NO_S_DX, (through_base + through_adapter / s, dA, dB)),
        (NO_S_DA, (dx, dA / s, dB)),
        (NO_S_DB, (dx, dA, dB / s)),
        (NO_S, (dx, dA / s, dB / s)),
        (NO_S, (through_base + through_adapter / s, dA / s, dB / s)),
        (MEAN, (dx, dA / M, dB / M)),
    ]
    return [Mistake(hint, value) for hint, value in values]


def _forward(inputs: Inputs) -> Callable[[Any], Any]:
    return lambda student: _saved(student("forward", *inputs))[0]


def _gradients(inputs: Inputs, dy: Tensor) -> Callable[[Any], Any]:
    def ask(student: Any) -> Any:
        _, saved = _saved(student("forward", *inputs))
        return student("backward", dy, *inputs[1:], saved)

    return ask


def _kept_within(inputs: Inputs, limit: int) -> Callable[[Any], Any]:
    def ask(student: Any) -> bool:
        _, saved = _saved(student("forward", *inputs))
        return sum(part.numel() for part in saved if isinstance(part, Tensor)) <= limit

    return ask


def _saved(answer: Any) -> tuple[Any, Any]:
    """(y, saved), or something that no case takes."""
    if isinstance(answer, tuple | list) and len(answer) == 2 and isinstance(answer[1], tuple | list):
        return answer[0], answer[1]
    return f"forward must return (y, saved), saved a tuple of tensors; it returned {type(answer).__name__}", ()
