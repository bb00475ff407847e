"""Exercise 12: the bytes of a QLoRA run, against the tensors that quantize and PagedAdamW really make."""

import math
from collections.abc import Callable, Sequence

import torch

from lessons.grading import Case, Forbidden, Mistake
from models.well_known import WELL_KNOWN
from optim import PagedAdamW
from quant import quantize
from trainers.memory_exact import adapter_tensors, four_bits, layer_linears, optimizer_state

TITLE = "the bytes that a QLoRA run holds"
VERSION = 1
MUST_NOT_USE = tuple(
    Forbidden(name, "count from the shapes") for name in ("quant", "optim", "kernels", "lora", "models", "trainers")
)

Shapes = Sequence[tuple[int, int]]

NO_SCALES = "the scales are forgotten: a block of 64 weights has one"
FP32_SCALES = (
    "the scales are counted at 4 bytes each, as without double quantization: they are 1 byte each, and a second level"
)
SECOND_AT_4 = "all scales are counted twice, 1 byte and 4: one fp32 absmax2 serves 256 of them"
NO_SECOND = "the second level is forgotten: an absmax2 for each 256 scales, and absmax_offset for each layer"
NO_OFFSET = "absmax_offset is forgotten: 4 bytes a layer"
SECOND_OF_64 = "the second level has blocks of 256 scales, not of 64"
SECOND_IN_1 = "absmax2 and absmax_offset are counted at 1 byte: they are fp32"
FLOOR = "the short block at the end is lost: it has a scale too. Round up, at both levels"
POOLED = (
    "the layers' blocks are counted as if they were one weight: each layer has its own blocks, and its own second level"
)
BY_ROW = "blocks are cut by row: they run over the flattened weight, across the ends of rows"
WHOLE_BYTE = "a weight is counted at a byte: two codes share one"
CODES_FLOOR = "the last of an odd number of weights is lost: it takes a byte. Round up, layer by layer"
PRODUCT = "an adapter is r · (K + N) numbers, not r · K · N"
A_ALONE = "one of lora_A (r, K) and lora_B (N, r) is missing"
HALF = "adapters are counted at 2 bytes a number: what is trained is fp32"
FROZEN = "gradients of the frozen weights are counted: backward passes through them and makes none for them"
FROZEN_STATE = "moments of the frozen weights are counted: the optimizer knows the adapters alone"
ONE_MOMENT = "one moment is counted: AdamW keeps exp_avg and exp_avg_sq"
STATE_8BIT = "the optimizer's state is counted at 2 bytes a number: that is the 8-bit state without its scales"


def expected(shapes: Shapes, r: int) -> dict[str, int]:
    """Quantize weights of these shapes, take one optimizer step, and add up what is there."""
    generator = torch.Generator().manual_seed(12)
    codes = scales = trained = 0
    parameters = []
    for N, K in shapes:
        q = quantize(torch.randn(N, K, generator=generator))
        parts = (q.absmax_8bit, q.absmax2, q.absmax_offset)
        codes += q.packed.nbytes
        scales += sum(part.nbytes for part in parts if part is not None)
        parameters += [torch.nn.Parameter(torch.zeros(r, K)), torch.nn.Parameter(torch.zeros(N, r))]
    optimizer = PagedAdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [state[name] for state in optimizer.state_dict()["state"].values() for name in ("exp_avg", "exp_avg_sq")]
    trained = sum(parameter.nbytes for parameter in parameters)
    gradients = sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
    return _answer(codes, scales, trained, gradients, sum(moment.nbytes for moment in moments))


def expected_of_model(name: str, r: int) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """(shapes, bytes) of a well-known model, by the planner's counts: too large to make."""
    config = WELL_KNOWN[name]
    shapes = [*layer_linears(config).values()] * config.num_hidden_layers
    weights, tensors = four_bits(config, 64, True), adapter_tensors(config, r)
    trained = 4 * sum(tensors)
    return shapes, _answer(
        weights.codes, weights.scales, trained, trained, optimizer_state(tensors, "paged_adamw").fast
    )


def _answer(codes: int, scales: int, adapters: int, gradients: int, optimizer: int) -> dict[str, int]:
    return {"codes": codes, "scales": scales, "adapters": adapters, "gradients": gradients, "optimizer": optimizer}


def wrong(shapes: Shapes, r: int, right: dict[str, int]) -> list[Mistake]:
    """Each mistake by the entries that it spoils."""
    blocks = [math.ceil(N * K / 64) for N, K in shapes]
    layers, weights, trained = len(shapes), sum(N * K for N, K in shapes), right["adapters"] // 4

    def scales_of(blocks: Sequence[int], second: Callable[[int], int], offset: int = 4) -> int:
        return sum(n + second(n) + offset for n in blocks)

    def second(n: int) -> int:
        return 4 * math.ceil(n / 256)

    def trains(n: int) -> dict[str, int]:
        return {"adapters": 4 * n, "gradients": 4 * n, "optimizer": 8 * n}

    n_pooled = math.ceil(weights / 64)
    by_row = [N * math.ceil(K / 64) for N, K in shapes]
    spoilt: list[tuple[str, dict[str, int]]] = [
        (WHOLE_BYTE, {"codes": weights}),
        (CODES_FLOOR, {"codes": sum(N * K // 2 for N, K in shapes)}),
        (CODES_FLOOR, {"codes": weights // 2}),
        (CODES_FLOOR, {"codes": math.ceil(weights / 2)}),
        (NO_SCALES, {"scales": 0}),
        (FP32_SCALES, {"scales": 4 * sum(blocks)}),
        (SECOND_AT_4, {"scales": 5 * sum(blocks) + 4 * layers}),
        (SECOND_AT_4, {"scales": 5 * sum(blocks)}),
        (NO_SECOND, {"scales": sum(blocks)}),
        (NO_OFFSET, {"scales": scales_of(blocks, second, 0)}),
        (SECOND_OF_64, {"scales": scales_of(blocks, lambda n: 4 * math.ceil(n / 64))}),
        (SECOND_IN_1, {"scales": scales_of(blocks, lambda n: math.ceil(n / 256), 1)}),
        (FLOOR, {"scales": scales_of([N * K // 64 for N, K in shapes], lambda n: 4 * (n // 256))}),
        (FLOOR, {"scales": scales_of(blocks, lambda n: 4 * (n // 256))}),
        (FLOOR, {"scales": scales_of([N * K // 64 for N, K in shapes], second)}),
        (BY_ROW, {"scales": scales_of(by_row, second)}),
        (POOLED, {"scales": n_pooled + second(n_pooled) + 4}),
        (POOLED, {"scales": n_pooled + second(n_pooled) + 4 * layers}),
        (PRODUCT, trains(r * weights)),
        (A_ALONE, trains(sum(r * K for _, K in shapes))),
        (A_ALONE, trains(sum(r * N for N, _ in shapes))),
        (HALF, {"adapters": 2 * trained}),
        (HALF, {"adapters": 2 * trained, "gradients": 2 * trained}),
        (FROZEN, {"gradients": 4 * (trained + weights)}),
        (FROZEN, {"gradients": 4 * weights}),
        (FROZEN_STATE, {"optimizer": 8 * (trained + weights)}),
        (ONE_MOMENT, {"optimizer": 4 * trained}),
        (STATE_8BIT, {"optimizer": 2 * trained}),
    ]
    return [Mistake(hint, right | entries) for hint, entries in spoilt]


def cases() -> list[Case]:
    small: dict[str, tuple[Shapes, int]] = {
        "one layer of 256 × 512": ([(256, 512)], 8),
        "a short block at the end": ([(50, 70)], 4),
        "three layers of other shapes": ([(33, 65), (160, 384), (7, 9)], 2),
    }
    calls = {name: (list(shapes), r, expected(shapes, r)) for name, (shapes, r) in small.items()}
    for model in ("smollm2-135m", "llama-3.1-8b"):
        shapes, right = expected_of_model(model, 16)
        calls[f"all linear layers of {model}"] = (shapes, 16, right)
    return [
        Case(
            name,
            lambda student, shapes=shapes, r=r: student("qlora_bytes", shapes, r),
            right,
            wrong(shapes, r, right),
        )
        for name, (shapes, r, right) in calls.items()
    ]
