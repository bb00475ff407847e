"""What compile_check compiles: each kernel with the arguments and options its launcher gives it, for one target."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .compile_check import Row, target_name
from .sass import main_loop, parse, pipes
from .triton import adamw, configs, dequantize, linear_cross_entropy, matmul, matmul_kernels, quantize
from .triton.configs import Config
from .triton.launch import EXACT, levels_of
from .triton.lookup import scaled_asm, words_asm

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
K = 4096
WEIGHT = {
    "packed": "*u8",
    "code": "*fp32",
    "absmax": "*u8",
    "absmax_code": "*fp32",
    "absmax2": "*fp32",
    "absmax_offset": "*fp32",
}


@dataclass(frozen=True)
class Case:
    """A kernel, the types of its arguments, its constants, and how many weights a thread looks up in an iteration."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    config: Config | str
    num_warps: int = 4
    num_stages: int = 1
    weights: float | None = None
    """None: no count (a kernel without weights to look up)"""
    not_divisible: tuple[str, ...] = field(default=("M",))
    """integer arguments that may be no multiple of 16; pointers always are"""

    def compile(self, target: int) -> Row:
        """Raises nothing: a compiler's error is the row's status."""
        name = self.name, str(self.config)
        try:
            compiled = triton.compile(
                self._source(),
                target=GPUTarget("hip", "gfx942", 64) if target == 942 else GPUTarget("cuda", target, 32),
                options={"num_warps": self.num_warps, "num_stages": self.num_stages, **EXACT},
            )
        except Exception as error:  # the compiler raises many kinds, and each is a result here
            return Row(target_name(target), *name, f"not compiled: {str(error).strip().splitlines()[-1][:100]}")
        read = self._read_amd if target == 942 else self._read_nvidia
        return Row(target_name(target), *name, "ok", shared=compiled.metadata.shared, **read(compiled.asm))

    def _source(self) -> ASTSource:
        names = self.kernel.arg_names
        signature = {name: self.signature.get(name, "constexpr") for name in names}
        aligned = [n for n, kind in self.signature.items() if kind != "fp32" and n not in self.not_divisible]
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        return ASTSource(self.kernel, signature, {(names.index(n),): v for n, v in self.constants.items()}, attributes)

    def _read_nvidia(self, asm: dict[str, Any]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(asm["cubin"])
            usage = tool("cuobjdump", "-res-usage", cubin)
            text = tool("nvdisasm", "-c", cubin)
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found, usage
        everything = parse(text)[0]
        loop = main_loop(text, "PRMT")
        by_pipe = pipes(loop)
        per = self.weights or 1
        return {
            "registers": int(found.group(1)),
            "stack": int(found.group(2)),
            "spills": sum(i.base in ("LDL", "STL") for i in everything),
            "tensor": sum(i.pipe == "tensor" for i in everything),
            "per_weight": round(len(loop) / per, 3) if self.weights else None,
            "pipes": " ".join(f"{pipe} {n / per:.2f}" for pipe, n in by_pipe.most_common()) if self.weights else "",
        }

    def _read_amd(self, asm: dict[str, Any]) -> dict[str, Any]:
        text = asm["amdgcn"]

        def number(key: str) -> int:
            found = re.search(rf"\.{key}:\s+(\d+)", text)
            return int(found.group(1)) if found else 0

        return {
            "registers": number("vgpr_count"),
            "stack": number("private_segment_fixed_size"),
            "spills": number("vgpr_spill_count"),
            "tensor": len(re.findall(r"^\s*v_mfma", text, re.MULTILINE)),
        }


def tool(name: str, *arguments: object, folder: str | None = None) -> str:
    """What one of the programs in Triton's wheel prints, run in `folder`."""
    command = [str(TOOLS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout


def cases(target: int, only: str = "") -> Iterator[Case]:
    """Every kernel that a GPU of this kind could be given, in whose name and tile `only` is found."""
    every = [*_dequantize(target), *_quantize(target), *_products(target), *_cross_entropy(target), *_adamw(target)]
    return (case for case in every if re.search(only, f"{case.name} {case.config}"))


def _dequantize(target: int) -> Iterator[Case]:
    dtype, name = (torch.float16, "fp16") if target == 75 else (torch.bfloat16, "bf16")
    if target != 942:
        yield Case(
            "dequantize words",
            dequantize.words_kernel,
            {n: t for n, t in WEIGHT.items() if n not in ("packed", "code")}
            | {"packed": "*u32", "out": "*u32", "n_groups": "i32"},
            {
                "BLOCKSIZE": 64,
                "DOUBLE": True,
                "GROUPS": dequantize.GROUPS,
                "ASM": words_asm(levels_of("nf4"), dtype, target),
            },
            f"{name} out",
            weights=dequantize.GROUPS * dequantize.GROUP / 128,
            not_divisible=("n_groups",),
        )
    for out in (name, "fp32"):
        yield Case(
            "dequantize gather",
            dequantize.gather_kernel,
            WEIGHT | {"out": f"*{out}", "n": "i32"},
            {"BLOCKSIZE": 64, "DOUBLE": True, "ROWS": dequantize.GATHERED // 64},
            f"{out} out",
            weights=dequantize.GATHERED / 128,
            not_divisible=(),
        )


def _quantize(target: int) -> Iterator[Case]:
    pointers = {"weight": "*fp16" if target == 75 else "*bf16", "midpoints": "*fp32", "indices": "*i32"}
    yield Case(
        "quantize",
        quantize.quantize_kernel,
        pointers | {"packed": "*u8", "absmax": "*fp32", "n": "i32"},
        {"BLOCKSIZE": 64, "ROWS": quantize.WEIGHTS // 64},
        "blocks of 64",
        not_divisible=(),
    )


def _adamw(target: int) -> Iterator[Case]:
    """fp32 parameters with fp32 gradients, and the GPU's 16-bit kind with its own."""
    numbers = {"n": "i32"} | dict.fromkeys(adamw.NUMBERS, "fp32")
    maps = dict.fromkeys(("m_absmax", "v_absmax", "m_level", "m_threshold", "v_level", "v_threshold"), "*fp32")
    for kind in ("fp32", "fp16" if target == 75 else "bf16"):
        pointers = dict.fromkeys(("p", "g"), f"*{kind}")
        for name, kernel, moments, block in (
            ("adamw", adamw.adamw_kernel, dict.fromkeys("mv", "*fp32"), adamw.BLOCK),
            ("adamw 8-bit", adamw.adamw_8bit_kernel, dict.fromkeys("mv", "*u8") | maps, adamw.STATE_BLOCK),
        ):
            signature = pointers | moments | numbers
            yield Case(name, kernel, signature, {"BLOCK": block}, f"{kind} p", not_divisible=("n",))


def _cross_entropy(target: int) -> Iterator[Case]:
    """Forward and dz, dense and 4-bit head. None where a GPU's tensor cores cannot be used: the reference runs it."""
    if target == 75:
        return
    shape = linear_cross_entropy.TILE | ({"num_stages": 1} if target == 942 else {})
    statistics = {
        "forward": {"largest": "*fp32", "total": "*fp32", "at_target": "*fp32", "part_size": "i32"},
        "dz": {"largest": "*fp32", "log_total": "*fp32", "dnll": "*fp32", "dz": "*bf16"},
    }
    for name, extra in statistics.items():
        for quantized in (False, True):
            weight = {("weight" if n == "packed" else n): t for n, t in WEIGHT.items()}
            asm = scaled_asm(levels_of("nf4"), torch.bfloat16) if quantized and target != 942 else None
            yield Case(
                f"cross-entropy {name}",
                linear_cross_entropy.forward_kernel if name == "forward" else linear_cross_entropy.dz_kernel,
                weight
                | {"x": "*bf16", "targets": "*i64", "over_temperature": "fp32", "M": "i32", "V": "i32"}
                | ({} if quantized else {"weight": "*bf16"})
                | extra,
                {"D": K, "BLOCKSIZE": 64, "DOUBLE": quantized, "QUANTIZED": quantized, "ASM": asm}
                | {name: shape[name] for name in ("BM", "BV", "BK")},
                "4-bit head" if quantized else "dense head",
                shape["num_warps"],
                shape["num_stages"],
                shape["BV"] * shape["BK"] / (32 * shape["num_warps"]) if quantized else None,
            )


def _products(target: int) -> Iterator[Case]:
    family = "amd" if target == 942 else configs.family(target)
    if family is None:
        return
    for direction in ("forward", "backward"):
        for config in configs.tiles(direction, family, 64):
            yield _product(direction, config, target)
            yield _product(f"{direction} lora", config, target)
        for config in configs.tiles(direction, family, 32):
            yield _product(f"{direction} 32", config, target)
    yield _product("decode", configs.FORWARD[family][0], target)
    yield _product("backward decode", configs.BACKWARD[family][0], target)
    yield _product("forward fp16", configs.FORWARD[family][-1], target)
    yield _product("backward fp16", configs.BACKWARD[family][-1], target)
    yield _product("forward exact", configs.EXACT_FP32, target)
    yield Case(
        "reduce",
        matmul_kernels.reduce_kernel,
        {"parts": "*fp32", "bias": "*bf16", "y": "*bf16", "M": "i32", "N": "i32"},
        {"HAS_BIAS": True, "SPLIT": 4, "BLOCK": matmul.REDUCE_BLOCK},
        "4 parts",
    )


def _product(name: str, config: Config, target: int) -> Case:
    """name: a direction, and lora, exact (fp32), fp16, 32 (blocks of 32), or decode (few rows: the sum in parts)."""
    backward = name.startswith("backward")
    kind = "fp32" if name.endswith("exact") else "fp16" if name.endswith("fp16") else "bf16"
    dtype = torch.float16 if kind == "fp16" else torch.bfloat16
    pointers = ("dy", "low", "up", "dx") if backward else ("x", "low", "up", "bias", "y")
    constants = {
        "K": K,
        "BLOCKSIZE": 32 if name.endswith("32") else 64,
        "DOUBLE": True,
        "HAS_LORA": name.endswith("lora"),
        "SPLIT": 4 if name.endswith("decode") else 1,
        "BM": config.BM,
        "BN": config.BN,
        "BK": config.BK,
        "GROUP": matmul.GROUP,
        "ASM": None if target == 942 or kind == "fp32" else scaled_asm(levels_of("nf4"), dtype),
    }
    return Case(
        name,
        matmul_kernels.backward_kernel if backward else matmul_kernels.forward_kernel,
        WEIGHT | dict.fromkeys(pointers, f"*{kind}") | dict.fromkeys(("M", "N", "rank"), "i32"),
        constants if backward else constants | {"HAS_BIAS": True},
        config,
        config.num_warps,
        config.num_stages,
        None if kind == "fp32" else config.BN * config.BK / (32 * config.num_warps),
    )
