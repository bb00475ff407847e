"""From two codes in a byte to two weights: the part that every 4-bit kernel here shares.

    ŵ[2j] = code[byte_j >> 4] · absmax          ŵ[2j+1] = code[byte_j & 15] · absmax          (the high nibble is first)
    absmax_b = absmax_code[absmax_8bit_b] · absmax2[b // 256] + absmax_offset                  (double quantization)

Three ways to look up, chosen at compile time:

gather   fp32 code · fp32 absmax, one rounding to the output dtype: quant.dequantize to the bit. Plain Triton, so the
         interpreter runs it, and AMD GPUs.
words    the same bits, cheaper, where a thread holds 16 bytes of one block: it rounds the 16 products code · absmax
         first, and looks those up (32 instructions for 32 weights). Only dequantize reads the weight in that order.
scaled   for matrix products: codes rounded to fp16 or bf16, absmax rounded too, their product rounded again. Three
         roundings where gather has one: a relative error of at most 3 · 2⁻⁸ a weight in bf16 and 3 · 2⁻¹¹ in fp16
         (2⁻⁸ and 2⁻¹¹ for gather), as long as weights and scales are no subnormals.

The last two are PTX around PRMT, which picks 4 bytes of 8 by the low nibbles of a selector. The packed codes are the
selectors: bits 0 to 2 of a nibble pick one of 8 table bytes, bit 3 the half of the table, and a 16-bit level is
looked up as two bytes. Register for 4 bytes of codes, 8 weights:

    n7 n6 n5 n4 n3 n2 n1 n0      nibbles of the little-endian word: n1 is weight 0, n0 is weight 1, n3 weight 2, …
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

Levels = tuple[float, ...]
FOUR = "=r,=r,=r,=r,r,r,r"  # registers of the `scaled` text: 4 words out; 4 bytes of codes and 4 half-width scales in
SIXTEEN = ",".join(["=r"] * 16 + ["r"] * 5)  # of the `words` text: 16 words out; 4 words of codes and a scale in

four_registers = tl.constexpr(FOUR)
sixteen_registers = tl.constexpr(SIXTEEN)
interpreting = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def block_scales(block, absmax, absmax_code, absmax2, absmax_offset, DOUBLE: tl.constexpr):
    """fp32 absmax of each `block` (an index tensor). Launch with enable_fp_fusion=False: · and + round apart."""
    if DOUBLE:
        level = tl.load(absmax_code + tl.load(absmax + block).to(tl.int32))
        scale = level * tl.load(absmax2 + (block >> 8)) + tl.load(absmax_offset)
    else:
        scale = tl.load(absmax + block)
    return scale


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """fp32 → dtype, to nearest even. Triton's interpreter would cut a bf16 short: there the rounding is spelt out."""
    if interpreting and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        result = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(dtype)
    return result


@triton.jit
def add_product(a, b, acc):
    """a · b + acc, fp32. Triton's interpreter would multiply the bits of a bf16: there both are widened first."""
    if interpreting and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def gather_codes(packed, code):
    """uint8 (R, C) → fp32 (R, 2·C): the code of every nibble, in order."""
    rows: tl.constexpr = packed.shape[0]
    columns: tl.constexpr = packed.shape[1]
    index = tl.interleave(packed >> 4, packed & 15).to(tl.int32)
    levels = tl.load(code + tl.arange(0, 16))
    flat = tl.gather(levels, tl.reshape(index, (rows * columns * 2,)), 0)
    return tl.reshape(flat, (rows, 2 * columns))


@triton.jit
def halves(words, dtype: tl.constexpr):
    """uint32 (R, C) → 16-bit floats (R, 2·C): the low half of each word comes first."""
    low = (words & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
    high = (words >> 16).to(tl.uint16).to(dtype, bitcast=True)
    return tl.interleave(low, high)


@triton.jit
def scaled_tile(packed, scale, code, dtype: tl.constexpr, ASM: tl.constexpr):
    """uint8 (R, C), fp32 scale (R,) → `dtype` (R, 2·C): the weights of R rows, each within one block.

    ASM is the text of `scaled_asm`, or None for the exact gather.
    """
    if ASM is None:
        tile = rounded(gather_codes(packed, code) * scale[:, None], dtype)
    else:
        words = tl.inline_asm_elementwise(
            ASM, four_registers, [packed, scale.to(dtype)[:, None]], dtype=tl.uint32, is_pure=True, pack=4
        )
        tile = halves(words, dtype)
    return tile


@lru_cache
def scaled_asm(levels: Levels, dtype: torch.dtype) -> str:
    """PTX: 4 bytes of codes ($4), 4 scales in `dtype` ($5, $6) → 4 words of 2 weights ($0 … $3)."""
    lines = [*_tables(levels, dtype), *_selectors("$4")]
    lines += [line for half in (0, 1) for line in _look_up(half, f"${2 * half}", f"${2 * half + 1}")]
    for i in range(4):
        both = "0x1010" if i % 2 == 0 else "0x3232"
        lines.append(f"prmt.b32 a, ${5 + i // 2}, ${5 + i // 2}, {both};")
        lines.append(_multiply(f"${i}", "a", dtype))
    return _block(lines, "s<2>", "w<2>", "t<8>", "a", "b", "l", "h")


@lru_cache
def words_asm(levels: Levels, dtype: torch.dtype, capability: int) -> str:
    """PTX: 4 words of codes ($16 … $19), an fp32 absmax ($20) → 16 words of 2 weights ($0 … $15), exact."""
    lines = []
    for i in range(8):
        first, second = (f"0f{_fp32_bits(level):08X}" for level in levels[2 * i : 2 * i + 2])
        lines += [f"mul.rn.f32 f0, $20, {first};", f"mul.rn.f32 f1, $20, {second};"]
        lines += _round_pair(f"p{i}", dtype, capability)
    for i in range(4):  # words of two levels to a plane of low bytes and one of high bytes
        lines += [
            f"prmt.b32 t{i}, p{2 * i}, p{2 * i + 1}, 0x6420;",
            f"prmt.b32 t{4 + i}, p{2 * i}, p{2 * i + 1}, 0x7531;",
        ]
    for word in range(4):
        lines += _selectors(f"${16 + word}")
        for half in (0, 1):
            lines += _look_up(half, f"${4 * word + 2 * half}", f"${4 * word + 2 * half + 1}")
    floats = ".reg .f32 f<2>;", ".reg .b16 c<2>;"
    return _block([*floats, *lines], "s<2>", "w<2>", "t<8>", "p<8>", "a", "b", "l", "h")


def _block(lines: Sequence[str], *registers: str) -> str:
    return "\n".join(["{", f".reg .b32 {', '.join(registers)};", *lines, "}"])


def _tables(levels: Levels, dtype: torch.dtype) -> list[str]:
    """t0 … t3: the low bytes of the 16 levels, t4 … t7: the high bytes."""
    bits = [v & 0xFFFF for v in torch.tensor(levels).to(dtype).view(torch.int16).tolist()]
    planes = [[(b >> shift) & 0xFF for b in bits] for shift in (0, 8)]
    words = [int.from_bytes(bytes(plane[i : i + 4]), "little") for plane in planes for i in (0, 4, 8, 12)]
    return [f"mov.b32 t{i}, 0x{word:08x};" for i, word in enumerate(words)]


def _selectors(codes: str) -> list[str]:
    """s: each nibble's index in half a table. w: byte i or 4 + i, by the nibble's high bit. s1, w1: bytes 2, 3."""
    return [
        f"and.b32 s0, {codes}, 0x77777777;",
        "shr.b32 s1, s0, 16;",
        f"and.b32 w0, {codes}, 0x88888888;",
        "shr.b32 w0, w0, 1;",
        "or.b32 w0, w0, 0x32103210;",
        "shr.b32 w1, w0, 16;",
    ]


def _look_up(half: int, first: str, second: str) -> list[str]:
    """4 nibbles (2 bytes of codes) → 2 words: low and high bytes of each level, then zipped, high nibble first."""
    lines = []
    for plane, found in ((0, "l"), (4, "h")):
        lines += [
            f"prmt.b32 a, t{plane}, t{plane + 1}, s{half};",
            f"prmt.b32 b, t{plane + 2}, t{plane + 3}, s{half};",
            f"prmt.b32 {found}, a, b, w{half};",
        ]
    return [*lines, f"prmt.b32 {first}, l, h, 0x4051;", f"prmt.b32 {second}, l, h, 0x6273;"]


def _multiply(word: str, scale: str, dtype: torch.dtype) -> str:
    """Both halves of word by those of scale. bf16 has no product before sm_90: a·b + (-0) rounds the same."""
    if dtype == torch.bfloat16:
        return f"mov.b32 b, 0x80008000; fma.rn.bf16x2 {word}, {word}, {scale}, b;"
    return f"mul.rn.f16x2 {word}, {word}, {scale};"


def _round_pair(word: str, dtype: torch.dtype, capability: int) -> list[str]:
    """f0 and f1 rounded to the low and high half of word. Before sm_80 there is no conversion of a pair."""
    if capability >= 80:
        return [f"cvt.rn.{'bf16x2' if dtype == torch.bfloat16 else 'f16x2'}.f32 {word}, f1, f0;"]
    return ["cvt.rn.f16.f32 c0, f0;", "cvt.rn.f16.f32 c1, f1;", f"mov.b32 {word}, {{c0, c1}};"]


def _fp32_bits(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32).item()) & 0xFFFFFFFF
