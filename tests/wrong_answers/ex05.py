"""Kernels that are wrong in one place each: `WRONG_AT` chooses the place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Wrong

BYTES = 64


@triton.jit
def spoilt_kernel(
    packed_ptr, code_ptr, absmax_ptr, out_ptr, n, BLOCKSIZE: tl.constexpr, BYTES: tl.constexpr, WRONG_AT: tl.constexpr
):
    byte = tl.arange(0, BYTES)
    if WRONG_AT != "program":
        byte += tl.program_id(0) * BYTES
    first = 2 * byte
    second = first + 1
    if WRONG_AT == "nibbles":
        first = 2 * byte + 1
        second = 2 * byte
    if WRONG_AT == "halves":
        first = byte
        second = byte + (n + 1) // 2
    codes = tl.load(packed_ptr + byte, mask=2 * byte < n, other=0)
    of_first = first // BLOCKSIZE
    of_second = second // BLOCKSIZE
    if WRONG_AT == "bytes":
        of_first = byte // BLOCKSIZE
        of_second = byte // BLOCKSIZE
    if WRONG_AT == "first":
        of_first = first * 0
        of_second = second * 0
    high = tl.load(code_ptr + (codes >> 4))
    low = tl.load(code_ptr + (codes & 15))
    if WRONG_AT != "scale":
        high *= tl.load(absmax_ptr + of_first, mask=first < n, other=0)
        low *= tl.load(absmax_ptr + of_second, mask=second < n, other=0)
    tl.store(out_ptr + first, high, mask=first < n)
    if WRONG_AT != "low":
        tl.store(out_ptr + second, low, mask=second < n)


def spoilt(where: str):
    def dequantize_nf4(packed: Tensor, code: Tensor, absmax: Tensor, n: int, blocksize: int) -> Tensor:
        out = torch.full((n,), torch.nan)
        grid = (triton.cdiv(len(packed), BYTES),)
        spoilt_kernel[grid](packed, code, absmax, out, n, BLOCKSIZE=blocksize, BYTES=BYTES, WRONG_AT=where)
        return out

    dequantize_nf4.__name__ = where
    return {"dequantize_nf4": dequantize_nf4}


WRONG = [
    Wrong("the two weights of each byte are swapped", spoilt("nibbles")),
    Wrong("the high nibbles fill the first half", spoilt("halves")),
    Wrong("absmax was looked up at byte // BLOCKSIZE", spoilt("bytes")),
    Wrong("every weight got the first absmax", spoilt("first")),
    Wrong("the levels were not multiplied by absmax", spoilt("scale")),
    Wrong("each program did the work of program 0", spoilt("program")),
    Wrong("some weights were not written", spoilt("low")),
]
