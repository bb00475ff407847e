"""dense: the product with a dense weight in fp32 or bf16: the head, in loss and decoding.

few rows        dense.h: the weight is read as it lies
more rows       matmul_large.h: a tile of it at a time is copied into the cache, as a quantized one is decoded

Activations in bf16 are widened, unless the unit multiplies pairs of bf16 numbers and the weight is bf16 too.
"""

import ctypes

import torch
from torch import Tensor

from .library import DTYPES, Product, load, why_missing, why_not, workspace
from .operations import PRODUCT_DTYPES

FEW = 96  # rows: above, a copied tile pays; in pairs, torch's product, which may have AMX, is about as fast
FEW_PORTABLE = 16  # rows: above, without vector instructions torch is faster, unless it would have to cast the weight
GROUP = 32  # of N and K: whole vectors, in every instruction set


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` takes these: x (M, K) and weight (N, K), each fp32 or bf16."""
    N, K = weight.shape
    if N % GROUP or K % GROUP or type(weight.data) is not Tensor:
        return False
    return not (why_missing() or why_not(PRODUCT_DTYPES, x, weight))


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` is to take these."""
    if not fits(x, weight):
        return False
    if in_pairs(x, weight):
        return len(x) <= FEW
    return len(x) <= FEW_PORTABLE or weight.dtype != x.dtype or load().isa != "portable"


def in_pairs(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` multiplies these as they are: both bf16, by instructions for pairs of them (simd.h)."""
    return x.dtype == weight.dtype == torch.bfloat16 and load().multiplies_pairs


def product(x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    """y fp32 (M, N) = x (M, K) · weightᵀ, products of exact values, summed in fp32."""
    (M, K), N, lib, threads = x.shape, len(weight), load(), torch.get_num_threads()
    dtype = DTYPES[weight.dtype]
    pairs = in_pairs(x, weight)
    if not pairs:
        x = x.float()
    if M <= FEW:
        lib.dense_few(x.data_ptr(), weight.data_ptr(), dtype, M, N, K, y.data_ptr(), pairs, threads)
        return y
    scratch = workspace(lib.workspace_floats(M, N, K, 0, threads))
    call = Product(M=M, N=N, K=K, x=x.data_ptr(), y=y.data_ptr(), workspace=scratch.data_ptr(), threads=threads)
    call.dense, call.dense_dtype = weight.data_ptr(), dtype
    if pairs:
        call.dtype = call.compute_dtype = dtype
    lib.matmul(ctypes.byref(call))
    return y
