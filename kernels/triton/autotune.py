"""Which tile shape, or dequantize and torch.matmul, is fastest for a product: measured once, kept, printable.

A fused product reads 0.52 bytes a weight and looks each up again for every tile of rows; dequantizing once writes and
reads 2 bytes a weight more and then runs at cuBLAS's speed. So there is a number of rows above which the second wins,
and it differs by GPU and shape. Nothing is assumed: both are timed at the first call of a shape.

The key of a measurement: GPU, direction, rows rounded up to a power of two, N, K, dtype, block size, levels of scales.
What was measured is kept in the cache (QLORA_CACHE), in a file for each version of Triton and of the kernels' source,
which later processes read; `table()` and `qlora bench autotune` list it. Where nothing was measured yet and nothing
may be (QLORA_AUTOTUNE=0, the interpreter, the capture of a CUDA graph) the lowest tile that holds all rows runs.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch
import triton
from torch import Tensor

from quant import QuantizedTensor

from ..cpu.build import cache_folder
from ..dispatch import say_once
from .configs import Config
from .launch import interpreted

Fused = Callable[[Config], Tensor]
Composed = Callable[[], Tensor]
COMPOSED = "dequantize + torch.matmul"

_choices: dict[str, str] = {}
_timings: dict[str, dict[str, float]] = {}


def run(
    direction: str,
    rows: Tensor,
    q: QuantizedTensor,
    candidates: Sequence[Config],
    fused: Fused,
    composed: Composed,
) -> Tensor:
    """The product by the fastest candidate, timing them all if this key is new."""
    key = key_of(direction, rows, q)
    by_name = {str(config): config for config in candidates}
    if key not in _choices:
        read_kept(kept_in())
    if _choices.get(key) not in (COMPOSED, *by_name):
        if not _may_time(rows):
            return fused(default(candidates, len(rows)))
        runs: dict[str, Composed] = {name: lambda c=config: fused(c) for name, config in by_name.items()}  # type: ignore[misc]
        choose(key, {**runs, COMPOSED: composed})
        keep(kept_in())
    choice = _choices[key]
    return composed() if choice == COMPOSED else fused(by_name[choice])


def choose(key: str, runs: dict[str, Composed], timer: Callable[[Composed], float] | None = None) -> str:
    """Time each of `runs`, remember the times and the fastest under `key`. A run that fails to compile is left out."""
    times: dict[str, float] = {}
    for name, call in runs.items():
        try:
            times[name] = (timer or milliseconds)(call)
        except (triton.runtime.errors.OutOfResources, triton.CompilationError):
            continue
    _timings[key] = times
    _choices[key] = min(times, key=lambda name: times[name])
    return _choices[key]


def milliseconds(call: Composed) -> float:
    """Median time of a call, its first ones (which compile) apart, with the L2 cache flushed in between."""
    return float(triton.testing.do_bench(call, warmup=10, rep=50, return_mode="median"))


def default(candidates: Sequence[Config], rows: int) -> Config:
    """Without timing: the lowest tile that takes all rows, or the tallest there is."""
    tall_enough = [config for config in candidates if rows <= config.BM]
    return tall_enough[0] if tall_enough else candidates[-1]


def key_of(direction: str, rows: Tensor, q: QuantizedTensor) -> str:
    M = triton.next_power_of_2(len(rows))
    levels = 2 if q.double_quant else 1
    gpu = _name_of(rows.device)
    dtype = str(rows.dtype).removeprefix("torch.")
    return f"{gpu} | {direction} | M {M} | {q.shape[0]}x{q.shape[1]} | {dtype} | {q.blocksize} | {levels}"


def chosen(direction: str, rows: Tensor, q: QuantizedTensor) -> str:
    """The candidate that `run` keeps to for this product, "" while nothing was measured."""
    return _choices.get(key_of(direction, rows, q), "")


@lru_cache
def _name_of(device: torch.device) -> str:
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else "cpu"


def table() -> list[str]:
    """One line a measured key: the choice, and the time of every candidate in milliseconds."""
    lines = []
    for key, choice in _choices.items():
        times = ", ".join(f"{name} {ms:.4f}" for name, ms in _timings.get(key, {}).items())
        lines.append(f"{key}: {choice} ({times})")
    return lines


def crossovers() -> list[dict[str, str]]:
    """One row a product, for all M that were measured: up to which M a fused kernel was faster than the composition."""
    groups: dict[str, dict[int, str]] = {}
    for key, choice in _choices.items():
        gpu, direction, M, *rest = key.split(" | ")
        groups.setdefault(" | ".join((gpu, direction, *rest)), {})[int(M.removeprefix("M "))] = choice
    rows = []
    for product, by_rows in groups.items():
        columns = ("gpu", "direction", "weight", "dtype", "blocksize", "levels")
        fused = [M for M, choice in by_rows.items() if choice != COMPOSED]
        told = {"fused_up_to": str(max(fused)) if fused else "never", "composed_at": _listed(set(by_rows) - set(fused))}
        rows.append(dict(zip(columns, product.split(" | "), strict=True)) | {"measured_at": _listed(by_rows)} | told)
    return rows


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def kept_in() -> Path:
    """The file of this version of Triton and of the kernels."""
    return cache_folder() / f"autotune-triton-{triton.__version__}-{source_hash()[:16]}.json"


@lru_cache
def source_hash() -> str:
    """Of every file here: other code, other times."""
    texts = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()


@lru_cache
def read_kept(path: Path) -> None:
    """Once a process. A file that is not there or not right is measured anew."""
    if path.exists():
        try:
            load(path)
        except (OSError, ValueError) as error:
            say_once(f"autotune measures again: {error}")


def keep(path: Path) -> None:
    """Together with what other processes have kept meanwhile. What cannot be written is measured again next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        own = dict(_choices), dict(_timings)
        if path.exists():
            with suppress(ValueError):
                load(path)
        _choices.update(own[0])
        _timings.update(own[1])
        save(path)
    except OSError as error:
        say_once(f"autotune could not keep what it measured: {error}")


def save(path: str | Path) -> None:
    """Write the choices and times as JSON."""
    aside = Path(path).with_name(f"{Path(path).name}.{os.getpid()}.tmp")
    aside.write_text(json.dumps({"choices": _choices, "timings": _timings}, indent=1), encoding="utf-8")
    os.replace(aside, path)


def load(path: str | Path) -> None:
    """Use the choices of `save` instead of timing again. Raises ValueError for a file that is not one."""
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        choices, timings = dict(saved["choices"]), dict(saved["timings"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a file of autotune choices: {error}") from None
    _choices.update(choices)
    _timings.update(timings)


def _may_time(rows: Tensor) -> bool:
    if interpreted() or not rows.is_cuda or os.environ.get("QLORA_AUTOTUNE") == "0":
        return False
    return not torch.cuda.is_current_stream_capturing()
