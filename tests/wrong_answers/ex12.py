from math import ceil
from typing import Any

from . import Wrong

Answer = dict[str, int]


def count(shapes: list[tuple[int, int]], r: int, how: str) -> Answer:
    """One right answer, spoilt on request; not the check's code."""
    if how == "pooled":
        pooled = count([(1, sum(N * K for N, K in shapes))], r, "")
        return count(shapes, r, "") | {"scales": pooled["scales"]}
    up = (lambda a, b: a // b) if how == "floor" else (lambda a, b: ceil(a / b))
    codes = scales = trained = frozen = 0
    for N, K in shapes:
        frozen += N * K
        codes += N * K if how == "whole byte" else N * K // 2 if how == "codes floor" else ceil(N * K / 2)
        n = N * ceil(K / 64) if how == "by row" else up(N * K, 64)
        wide = {
            "fp32": 4 * n,
            "no second": n,
            "second at 4": 5 * n + 4,
            "no scales": 0,
            "no offset": n + 4 * up(n, 256),
        }
        second = up(n, 64 if how == "second of 64" else 256)
        scales += wide.get(how, n + (1 if how == "second in 1" else 4) * (second + 1))
        trained += {"product": r * N * K, "A alone": r * K}.get(how, r * K + r * N)
    size = 2 if how == "half" else 4
    return {
        "codes": codes,
        "scales": scales,
        "adapters": size * trained,
        "gradients": 4 * (trained + (frozen if how == "frozen" else 0)),
        "optimizer": {"one moment": 4, "8 bits": 2}.get(how, 8) * (trained + (frozen if how == "frozen state" else 0)),
    }


HINTS = {
    "no scales": "the scales are forgotten",
    "fp32": "as without double quantization",
    "second at 4": "all scales are counted twice",
    "no second": "the second level is forgotten",
    "no offset": "absmax_offset is forgotten",
    "second of 64": "blocks of 256 scales, not of 64",
    "second in 1": "counted at 1 byte",
    "floor": "the short block at the end is lost",
    "pooled": "as if they were one weight",
    "by row": "blocks are cut by row",
    "whole byte": "two codes share one",
    "codes floor": "odd number of weights",
    "product": "not r · K · N",
    "A alone": "one of lora_A (r, K) and lora_B (N, r) is missing",
    "half": "2 bytes a number: what is trained is fp32",
    "frozen": "gradients of the frozen weights",
    "frozen state": "moments of the frozen weights",
    "one moment": "one moment is counted",
    "8 bits": "8-bit state",
}


def spoilt(how: str) -> Wrong:
    def answer(*arguments: Any) -> Answer:
        return count(*arguments, how)

    answer.__name__ = how.replace(" ", "_")
    return Wrong(HINTS[how], {"qlora_bytes": answer})


WRONG = list(map(spoilt, HINTS))
