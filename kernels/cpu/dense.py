"""dense: a few rows under a dense weight in bf16 (dense.h): what decoding asks of a head that is held in bf16."""

import torch
from torch import Tensor

from .library import load, why_missing, why_not

ROWS = 64  # above, casting the weight once costs less than reading it for every 4 rows
TILE = 4  # a multiple of every TILE_N


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether dense_bf16 takes x and weight: x fp32 (…, K) of few rows, weight bf16 (N, K)."""
    few = 0 < x.numel() <= ROWS * x.shape[-1] and weight.shape[0] % TILE == 0
    return few and not (why_missing() or why_not((torch.float32,), x) or why_not((torch.bfloat16,), weight))


def dense_bf16(x: Tensor, weight: Tensor) -> Tensor:
    """x (…, K) · weightᵀ → fp32 (…, N); products of the weight's exact values, summed in fp32."""
    N, K = weight.shape
    y = torch.empty(*x.shape[:-1], N)
    load().dense_bf16(x.data_ptr(), weight.data_ptr(), x.numel() // K, N, K, y.data_ptr(), torch.get_num_threads())
    return y
