"""bitsandbytes' shipped CUDA kernels, disassembled for the same GPUs and counted the same way, to stand beside ours.

The library files are read as data: nothing of bitsandbytes is imported or run. Its wheel for any platform holds them.
How many weights a thread has in hand in an iteration follows from each kernel's template arguments:

    kDequantizeBlockwise<T, 512, 64, 8, 2>     512 bytes by 64 threads: 16 weights
    gemm_4bit_simt<T, M>                       16 bytes a lane: 32 weights
    gemm_4bit_sm80_m16n8k16<T, MT, NT, KC>     NT · KC weights by 256 threads, and as often as the loop is unrolled,
                                               which its tensor instructions tell (MT · NT · KC / 2048 by 8 warps)

The last two shuffle once for each weight: a loop in which they do not was misread, and gets no figure;
nor does a product with more branches than weights: that is its path for ragged edges. Its dequantize
takes fp32 scales: double quantization costs two launches more, which are not counted.
"""

import re
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path
from typing import Any

from .compile_cases import tool
from .compile_check import Row, target_name
from .sass import count, main_loop, parse, pipes, walk

GEMM = re.compile(r"_Z23gemm_4bit_sm80_m16n8k16I13__nv_bfloat16Li(\d+)ELi(\d+)ELi(\d+)E")
SIMT = re.compile(r"_Z14gemm_4bit_simtI13__nv_bfloat16Li([18])E")
DEQUANTIZE = re.compile(r"_Z20kDequantizeBlockwiseI13__nv_bfloat16Li512ELi64ELi8ELi2E")
DEQUANTIZE_FP16 = re.compile(r"_Z20kDequantizeBlockwiseI6__halfLi512ELi64ELi8ELi2E")
THREADS = 256


def peer_rows(targets: Sequence[int]) -> list[Row]:
    """A row for each of its 4-bit kernels and targets; one row that says so where its CUDA libraries are not here."""
    library = newest_library()
    if library is None:
        return [Row("-", "bitsandbytes", "-", "not installed, or without CUDA libraries")]
    rows = []
    for target in targets:
        if target != 942:
            rows += _target_rows(library, target)
    return rows


def newest_library() -> Path | None:
    """libbitsandbytes_cudaNNN.so with the highest NNN."""
    try:
        listed = files("bitsandbytes") or []
    except PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in listed if re.fullmatch(r"libbitsandbytes_cuda\d+\.so", file.name)]
    return max(found, key=lambda path: path.name, default=None)


def _target_rows(library: Path, target: int) -> list[Row]:
    label = f"bitsandbytes {version('bitsandbytes')}"
    with tempfile.TemporaryDirectory() as folder:
        tool("cuobjdump", "--extract-elf", f"sm_{target}.cubin", library.resolve(), folder=folder)
        cubins = list(Path(folder).glob("*.cubin"))
        if not cubins:
            return [Row(target_name(target), label, "-", f"{library.name} holds no code for it")]
        usage = tool("cuobjdump", "-res-usage", cubins[0])
        rows = []
        for name, registers, stack, shared in re.findall(
            r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage
        ):
            counted = _count(name, target, cubins[0])
            if counted is not None:
                config, figures = counted
                sizes = (int(registers), int(figures.pop("spills", 0)), int(stack), int(shared))
                rows.append(Row(target_name(target), label, config, "ok", *sizes, **figures))
    return sorted(rows, key=lambda row: row.config)


def _count(name: str, target: int, cubin: Path) -> tuple[str, dict[str, Any]] | None:
    """A kernel's description and the figures of its main loop, None for a kernel that is not compared."""
    gemm, simt = GEMM.match(name), SIMT.match(name)
    dequantize = (DEQUANTIZE_FP16 if target == 75 else DEQUANTIZE).match(name)
    if not (gemm or simt or dequantize) or (gemm and target == 75):
        return None
    text = tool("cuobjdump", "-sass", "-fun", name, cubin)
    if gemm:
        MT, NT, KC = map(int, gemm.groups())
        config, loop = f"forward {MT}x{NT}x{KC}", walk(text, "HMMA")
        weights = NT * KC / THREADS * count(loop, "HMMA") / (MT * NT * KC / 2048 / 8)
    elif simt:
        config, loop, weights = f"forward simt M={simt.group(1)}", walk(text, "SHFL"), 32.0
    else:
        config, loop, weights = "dequantize", main_loop(text, "STG"), 16.0
    every = parse(text)[0]
    if len(every) < 100:  # an empty body: this GPU is served by another of its kernels
        return None
    misread = not weights or (not dequantize and abs(count(loop, "SHFL") / weights - 1) > 0.05)
    if misread or (gemm and pipes(loop)["control"] > weights):
        return config, {"spills": sum(i.base in ("LDL", "STL") for i in every)}
    return config, {
        "tensor": sum(i.pipe == "tensor" for i in every),
        "spills": sum(i.base in ("LDL", "STL") for i in every),
        "per_weight": round(len(loop) / weights, 3),
        "pipes": " ".join(f"{pipe} {n / weights:.2f}" for pipe, n in pipes(loop).most_common()),
    }
