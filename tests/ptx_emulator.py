"""The few PTX instructions that kernels/triton/lookup.py uses, on arrays of registers: it runs the very text that the
GPU compiler gets. Written from NVIDIA's PTX ISA manual (prmt's default mode, cvt.rn, fma.rn on pairs)."""

from __future__ import annotations

import re

import numpy as np

Registers = dict[str, np.ndarray]


def run(text: str, inputs: Registers) -> Registers:
    """Execute the text with `inputs` (uint32 arrays of one length, by name, such as "$4"); returns all registers."""
    registers = {name: np.asarray(value, dtype=np.uint32) for name, value in inputs.items()}
    size = len(next(iter(registers.values())))
    body = text.strip().removeprefix("{").removesuffix("}")
    for statement in (s.strip() for s in body.split(";")):
        if not statement or statement.startswith(".reg"):
            continue
        name, arguments = statement.split(maxsplit=1)
        pair = re.fullmatch(r"(\w+), \{(\w+), (\w+)\}", arguments)
        if pair:
            assert name == "mov.b32"
            registers[pair[1]] = registers[pair[2]] | (registers[pair[3]] << np.uint32(16))
            continue
        target, *sources = arguments.split(", ")
        registers[target] = _OPERATIONS[name](*(_value(source, registers, size) for source in sources))
    return registers


def _value(source: str, registers: Registers, size: int) -> np.ndarray:
    if source in registers:
        return registers[source]
    number = int(source[2:], 16) if source.startswith("0f") else int(source, 0)
    return np.full(size, number, dtype=np.uint32)


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Byte i of the result: byte (nibble i of selector, low 3 bits) of b:a; its sign repeated if the nibble's bit 3."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> ((nibble & 7).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & np.uint32(255)
        sign = np.where(byte & 128, 255, 0).astype(np.uint32)
        result |= np.where(nibble & 8, sign, byte).astype(np.uint32) << np.uint32(8 * i)
    return result


def bf16_bits(value: np.ndarray) -> np.ndarray:
    """fp32 → bits of the nearest bf16, ties to even."""
    bits = value.astype(np.float32).view(np.uint32)
    return (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


def _fp16_bits(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float16).view(np.uint16).astype(np.uint32)


def _bf16(bits: np.ndarray) -> np.ndarray:
    return (bits << np.uint32(16)).view(np.float32)


def _fp16(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


def _halves(word: np.ndarray) -> list[np.ndarray]:
    return [word & np.uint32(0xFFFF), word >> np.uint32(16)]


def _fma_bf16x2(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    # a product of two bf16 is exact in fp32, and c is -0 in the texts, so that adding it is exact too
    assert (c == 0x80008000).all()
    low, high = (
        bf16_bits(_bf16(x) * _bf16(y) + _bf16(z)) for x, y, z in zip(_halves(a), _halves(b), _halves(c), strict=True)
    )
    return low | (high << np.uint32(16))


def _mul_f16x2(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    low, high = (_fp16_bits(_fp16(x) * _fp16(y)) for x, y in zip(_halves(a), _halves(b), strict=True))
    return low | (high << np.uint32(16))


_OPERATIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shr.b32": lambda a, b: a >> b,
    "prmt.b32": _prmt,
    "fma.rn.bf16x2": _fma_bf16x2,
    "mul.rn.f16x2": _mul_f16x2,
    "mul.rn.f32": lambda a, b: (a.view(np.float32) * b.view(np.float32)).view(np.uint32),
    # of a pair, the first source becomes the high half
    "cvt.rn.bf16x2.f32": lambda a, b: (bf16_bits(a.view(np.float32)) << np.uint32(16)) | bf16_bits(b.view(np.float32)),
    "cvt.rn.f16x2.f32": lambda a, b: (_fp16_bits(a.view(np.float32)) << np.uint32(16)) | _fp16_bits(b.view(np.float32)),
    "cvt.rn.f16.f32": lambda a: _fp16_bits(a.view(np.float32)),
}
