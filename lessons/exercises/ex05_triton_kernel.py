"""Exercise 5: a Triton kernel that dequantizes NF4. Notebook: 05_triton_kernel.ipynb. Grade: qlora grade 5"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BYTES = 64  # packed bytes to a program: it writes twice as many weights


@triton.jit
def dequantize_kernel(packed_ptr, code_ptr, absmax_ptr, out_ptr, n, BLOCKSIZE: tl.constexpr, BYTES: tl.constexpr):
    """out[i] = code[index i] · absmax[i // BLOCKSIZE], for the weights of BYTES packed bytes.

    packed_ptr uint8 (⌈n/2⌉,): two indices a byte, the first in the high nibble; code_ptr fp32 (16,); absmax_ptr fp32
    (⌈n/BLOCKSIZE⌉,); out_ptr fp32 (n,). n may be odd, and need not be a multiple of anything.
    """
    pass  # your kernel


def dequantize_nf4(packed: Tensor, code: Tensor, absmax: Tensor, n: int, blocksize: int) -> Tensor:
    """The n weights that were quantized, fp32 (n,): ŵ = code[index] · absmax of its block.

    packed uint8 (⌈n/2⌉,), code fp32 (16,), absmax fp32 (⌈n/blocksize⌉,). This function is finished: it makes room for
    the weights, filled with NaN so that one which nobody wrote shows, and starts a program for each BYTES bytes.

    Not to be used: quant, kernels, and torch for the arithmetic.
    """
    # the exercise: this part is the reader's to write, and `qlora grade 5` says so until it is
    raise NotImplementedError("write dequantize_kernel, then delete this line")
    out = torch.full((n,), torch.nan)
    grid = (triton.cdiv(len(packed), BYTES),)
    dequantize_kernel[grid](packed, code, absmax, out, n, BLOCKSIZE=blocksize, BYTES=BYTES)
    return out
