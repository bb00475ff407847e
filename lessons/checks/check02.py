"""Exercise 2: LoRA's forward and merge, against kernels.lora_matmul and LoRAConfig's scaling.

The numbers are small integers and the scalings powers of two, so that every order of the sums gives the same bits.
"""

import math

import torch
from torch import Tensor

from kernels import LoRATerm, lora_matmul
from lessons.grading import Case, Forbidden, Mistake
from lora import LoRAConfig

TITLE = "LoRA: forward and merge"
VERSION = 1
MUST_NOT_USE = tuple(Forbidden(name, "write the formula with torch") for name in ("kernels", "lora", "quant"))

NO_R = "the scaling is alpha, and should be alpha / r: then the size of the update does not grow with the rank"
INVERTED = "the scaling is r / alpha, and should be alpha / r"
ROOT = "the scaling is alpha / √r, which is rsLoRA; here it is alpha / r"
NO_SCALING = "the update is not scaled: multiply it by alpha / r"
NO_BASE = "the base is missing: the result is the update alone"
TRANSPOSED = "the update is added transposed, which a square weight lets pass: it is B · A, (N, r) · (r, K)"
ROUNDED_TWICE = "the update was rounded to weight's dtype before it was added: add in fp32, round the sum"


def cases() -> list[Case]:
    generator = torch.Generator().manual_seed(2)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, generator=generator).float()

    found = []
    for name, M, N, K, r, alpha in [
        ("r = 4, alpha = 16", (5,), 6, 10, 4, 16),
        ("r = 8, alpha = 4", (2, 3), 5, 7, 8, 4),
    ]:
        x, W, A, B = integers(*M, K), integers(N, K), integers(r, K), integers(N, r)
        s = LoRAConfig(r=r, alpha=alpha).scaling("layer")
        base, update = x @ W.T, x @ A.T @ B.T
        expected = lora_matmul(x, W, [LoRATerm(A, B, s)])
        arguments = (x, W, A, B, float(alpha))
        found.append(
            Case(f"forward, {name}", _call("lora_forward", arguments), expected, _scalings(base, update, r, alpha))
        )
    W, A, B = integers(6, 10), integers(4, 10), integers(6, 4)
    found.append(Case("merge", _call("merge", (W, A, B, 8.0)), W + 2 * (B @ A), _scalings(W, B @ A, 4, 8)))
    W, A, B = integers(6, 6), integers(2, 6), integers(6, 2)
    mistakes = [Mistake(TRANSPOSED, W + 2 * (B @ A).T), *_scalings(W, B @ A, 2, 4)]
    found.append(Case("merge, a square weight", _call("merge", (W, A, B, 4.0)), W + 2 * (B @ A), mistakes))
    W = torch.randn(64, 64, generator=generator).bfloat16()
    A, B = torch.randn(1, 64, generator=generator) / 8, torch.randn(64, 1, generator=generator)  # r = 1: no sums
    once, twice = (W.float() + 2 * (B @ A)).bfloat16(), W + (2 * (B @ A)).bfloat16()
    mistakes = [Mistake(ROUNDED_TWICE, twice), Mistake(ROUNDED_TWICE, W + 2 * (B.bfloat16() @ A.bfloat16()))]
    found.append(Case("merge into bf16", _call("merge", (W, A, B, 2.0)), once, mistakes))
    return found


def _call(name: str, arguments: tuple):
    return lambda student: student(name, *arguments)


def _scalings(base: Tensor, update: Tensor, r: int, alpha: float) -> list[Mistake]:
    return [
        Mistake(NO_R, base + alpha * update),
        Mistake(INVERTED, base + r / alpha * update),
        Mistake(ROOT, base + alpha / math.sqrt(r) * update),
        Mistake(NO_SCALING, base + update),
        Mistake(NO_BASE, alpha / r * update),
    ]
