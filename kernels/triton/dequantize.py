"""dequantize on a GPU: ŵ = code[index] · absmax, both levels of scales decoded in one kernel.

Equals quant.dequantize to the bit, in every dtype. Two kernels: `words_kernel`, where a thread holds 16 bytes of one
block (fp16 and bf16, a whole number of 32 weights), and `gather_kernel` for the rest: fp32, tails, the interpreter,
AMD. Codes stored one to a byte (nf2, nf3, nf5 … nf8) go through the reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant import QuantizedTensor

from ..dequantize import dequantize_reference
from ..dispatch import register
from .launch import EXACT, FLOATS, capability, check_device, levels_of, on_device_of, weight_arguments
from .lookup import block_scales, gather_codes, rounded, sixteen_registers, words_asm

GROUP = 32  # weights to a group: 4 words of codes, one load of 16 bytes
GROUPS = 256  # to a program of `words_kernel`
GATHERED = 4096  # weights to a program of `gather_kernel`

sixteen_words = tl.constexpr((tl.uint32,) * 16)


@triton.jit
def words_kernel(
    packed,
    absmax,
    absmax_code,
    absmax2,
    absmax_offset,
    out,
    n_groups,
    BLOCKSIZE: tl.constexpr,
    DOUBLE: tl.constexpr,
    GROUPS: tl.constexpr,
    ASM: tl.constexpr,
):
    """A program: GROUPS groups. packed and out are uint32, 4 and 16 words to a group."""
    first = tl.program_id(0).to(tl.int64) * GROUPS
    group = first + tl.arange(0, GROUPS)
    word = first * 4 + tl.arange(0, GROUPS * 4)
    codes = tl.load(packed + word, word < n_groups * 4, other=0)
    even, odd = tl.split(tl.reshape(codes, (GROUPS, 2, 2)))
    c0, c2 = tl.split(even)
    c1, c3 = tl.split(odd)
    block = tl.minimum(group, n_groups - 1) // (BLOCKSIZE // 32)
    scale = block_scales(block, absmax, absmax_code, absmax2, absmax_offset, DOUBLE)
    w = tl.inline_asm_elementwise(
        ASM, sixteen_registers, [c0, c1, c2, c3, scale], dtype=sixteen_words, is_pure=True, pack=1
    )
    # tl.join appends the lowest bit of the order last, so word 8 is joined to word 0 first
    by_4 = _join4(w[0], w[8], w[4], w[12]), _join4(w[2], w[10], w[6], w[14])
    by_4_odd = _join4(w[1], w[9], w[5], w[13]), _join4(w[3], w[11], w[7], w[15])
    weight = _join4(by_4[0], by_4[1], by_4_odd[0], by_4_odd[1])
    at = first * 16 + tl.arange(0, GROUPS * 16)
    tl.store(out + at, tl.reshape(weight, (GROUPS * 16,)), at < n_groups * 16)


@triton.jit
def _join4(a, b, c, d):
    """Two new axes of 2: (0, 0) is a, (1, 0) is b, (0, 1) is c, (1, 1) is d."""
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def gather_kernel(
    packed,
    code,
    absmax,
    absmax_code,
    absmax2,
    absmax_offset,
    out,
    n,
    BLOCKSIZE: tl.constexpr,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program: ROWS blocks. The last block, and the last byte, may be cut short."""
    first = tl.program_id(0).to(tl.int64) * ROWS  # from here on, 32-bit offsets do
    left = tl.minimum(n - first * BLOCKSIZE, ROWS * BLOCKSIZE).to(tl.int32)
    row = tl.arange(0, ROWS)
    byte = row[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    codes = tl.load(packed + first * (BLOCKSIZE // 2) + byte, byte < (left + 1) // 2, other=0)
    block = first + tl.minimum(row, (left - 1) // BLOCKSIZE)
    scale = block_scales(block, absmax, absmax_code, absmax2, absmax_offset, DOUBLE)
    weight = gather_codes(codes, code) * scale[:, None]
    at = row[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    tl.store(out + first * BLOCKSIZE + at, rounded(weight, out.dtype.element_ty), at < left)


@register("dequantize", "triton")
def dequantize_triton(q: QuantizedTensor, out: Tensor) -> None:
    """Fill `out` (contiguous, q.shape)."""
    check_device("dequantize", out)
    if len(q.code) != 16:
        dequantize_reference(q, out)
    elif out.dtype not in FLOATS:
        wide = torch.empty(q.shape, dtype=torch.float32, device=out.device)
        dequantize_triton(q, wide)
        out.copy_(wide)
    else:
        with on_device_of(out):
            (_launch_words if words_fit(q, out) else _launch_gather)(q, out)


def words_fit(q: QuantizedTensor, out: Tensor) -> bool:
    """May `words_kernel` run: PTX, 16-bit output, whole groups, and pointers that a 16-byte load takes."""
    sm = capability(out.device)
    served = out.dtype == torch.float16 or (out.dtype == torch.bfloat16 and sm is not None and sm >= 80)
    aligned = q.packed.data_ptr() % 16 == 0 and out.data_ptr() % 16 == 0
    return sm is not None and served and aligned and q.numel % GROUP == 0


def _launch_words(q: QuantizedTensor, out: Tensor) -> None:
    packed, _, *scales = weight_arguments(q)
    n_groups = q.numel // GROUP
    asm = words_asm(levels_of(q.quant_type), out.dtype, capability(out.device) or 0)
    words_kernel[(triton.cdiv(n_groups, GROUPS),)](
        packed.view(torch.uint32),
        *scales,
        out.view(-1).view(torch.uint32),
        n_groups,
        BLOCKSIZE=q.blocksize,
        DOUBLE=q.double_quant,
        GROUPS=GROUPS,
        ASM=asm,
        num_warps=4,
        **EXACT,
    )


def _launch_gather(q: QuantizedTensor, out: Tensor) -> None:
    rows = max(1, GATHERED // q.blocksize)
    gather_kernel[(triton.cdiv(q.n_blocks, rows),)](
        *weight_arguments(q),
        out,
        q.numel,
        BLOCKSIZE=q.blocksize,
        DOUBLE=q.double_quant,
        ROWS=rows,
        num_warps=4,
        **EXACT,
    )
