"""What the kernel benchmarks share: flags, turns, and the peer's view of our weight.

The arms of a comparison take turns for `--rounds` rounds, so that whatever else the machine does falls on all of them.
A row holds an arm's 20th, 50th and 80th percentile in milliseconds, and `ratio`: the median over the rounds of its time
divided by the base arm's in the same round.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kernels import describe_backends
from quant import QuantizedTensor, to_bnb_state_dict

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARM_UP = 2


def parser(doc: str, *, shapes: str) -> argparse.ArgumentParser:
    """The flags every kernel benchmark has."""
    flags = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--shapes", default=shapes, help="N×K of the weights, as 4096x4096,1024x4096")
    flags.add_argument("--dtype", default="fp32", choices=DTYPES)
    flags.add_argument("--rounds", type=int, default=9)
    flags.add_argument("--no-double-quant", action="store_true")
    flags.add_argument("--no-peer", action="store_true", help="leave bitsandbytes out")
    return flags


def shapes_of(text: str) -> list[tuple[int, int]]:
    """4096x4096,1024x4096 → [(4096, 4096), (1024, 4096)]"""
    return [(int(n), int(k)) for n, k in (shape.split("x") for shape in text.split(","))]


def take_turns(
    arms: dict[str, Callable[[], Any]],
    rounds: int,
    *,
    pause: float = 0.0,
    before: dict[str, Callable[[], Any]] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of every round of every arm. pause: seconds before each, in which OpenMP's threads stop spinning.

    before: what each arm does first, untimed.
    """
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(WARM_UP + rounds):
        for name, run in arms.items():
            time.sleep(pause)
            if before:
                before[name]()
            start = time.perf_counter()
            run()
            if turn >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def rows_of(
    case: dict[str, Any], times: dict[str, list[float]], base: str, peers: Sequence[str] = ("bitsandbytes",)
) -> list[dict[str, Any]]:
    """A CSV row for every arm of one case. peers: the packages whose versions the rows name."""
    shared = case | {"backend": describe_backends()["cpu"].partition(":")[0], "peer_versions": versions(*peers)}
    return [
        {"key": "/".join([*map(str, case.values()), arm]), "arm": arm} | shared | spread(taken, times[base], base)
        for arm, taken in times.items()
    ]


def spread(taken: list[float], base_taken: list[float], base: str, digits: int = 3) -> dict[str, Any]:
    """Percentiles of an arm's milliseconds, and the median over the rounds of their ratio to the base arm's."""
    fifths = statistics.quantiles(taken, n=5, method="inclusive")
    ratio = statistics.median(a / b for a, b in zip(taken, base_taken, strict=True))
    middle = statistics.median(taken)
    milliseconds = {"p20_ms": fifths[0], "p50_ms": middle, "p80_ms": fifths[-1]}
    return {name: f"{value:.{digits}f}" for name, value in milliseconds.items()} | {
        "rounds": len(taken),
        "base": base,
        "ratio": f"{ratio:.4f}",
    }


def versions(*packages: str) -> str:
    """Of those that are installed."""
    return ", ".join(f"{package} {version(package)}" for package in packages if find_spec(package))


def bnb_weight(q: QuantizedTensor) -> tuple[Tensor, Any]:
    """Our weight as bitsandbytes holds it: packed bytes and QuantState."""
    from bitsandbytes.functional import QuantState

    stored = to_bnb_state_dict(q, "w")
    state = QuantState.from_dict({k.removeprefix("w."): v for k, v in stored.items() if k != "w"}, q.packed.device)
    return stored["w"], state


def check_accuracy(ours: Tensor, plain: Tensor, exact: Tensor, what: str) -> None:
    """The gate before any time counts. Raises ValueError when ours errs more than twice as much as plain torch."""
    mine, allowed = ((t.double() - exact).norm().item() for t in (ours, plain))
    if not mine <= 2 * allowed:
        raise ValueError(f"{what}: error {mine:.3g}, plain torch's is {allowed:.3g}")
