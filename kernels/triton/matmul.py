"""matmul on a GPU: who serves a product of this shape, and its launch. The kernels are in matmul_kernels.py.

Served by the fused kernels: 4-bit codes, K a multiple of the block size, fp16, bf16 or fp32 activations, a GPU with
an entry in configs.py. Everything else is dequantized (by our kernel) and given to torch.matmul, and `logging` says
why, once. autotune.py times both on the shapes at hand and keeps the faster.
"""

from functools import lru_cache

import torch
import triton
from torch import Tensor

from quant import QuantizedTensor

from ..dequantize import dequantize
from ..dispatch import register, say_once
from ..lora_matmul import low_rank_product
from . import autotune, configs
from .configs import Config
from .launch import EXACT, FLOATS, capability, check_device, interpreted, on_device_of, scaled_lookup, weight_arguments
from .matmul_kernels import backward_kernel, forward_kernel, reduce_kernel

REDUCE_BLOCK = 1024  # sums to a program of reduce_kernel
GROUP = 8  # tiles of rows that use a weight tile one after the other
Low = tuple[Tensor, Tensor]
"""The LoRA terms of a product, side by side: low (M, r) and up, (N, r) in forward and (r, K) in backward."""


@register("matmul", "triton")
def matmul_triton(x: Tensor, q: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """x (…, K) · Ŵᵀ + bias → (…, N)."""
    return forward(x, q, bias)


@register("matmul_dx", "triton")
def matmul_dx_triton(dy: Tensor, q: QuantizedTensor) -> Tensor:
    """dy (…, N) · Ŵ → (…, K)."""
    return backward(dy, q)


def forward(
    x: Tensor, q: QuantizedTensor, bias: Tensor | None, low: Tensor | None = None, up: Tensor | None = None
) -> Tensor:
    """x (…, K) · Ŵᵀ + low (M, r) · upᵀ + bias → (…, N) in x.dtype; up (N, r)."""
    check_device("matmul", x)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    bias = None if bias is None else bias.to(x.dtype)

    def fused(config: Config) -> Tensor:
        return launch_forward(rows, q, bias, _pair(low, up), config)

    def composed() -> Tensor:
        return low_rank_product(rows, dequantize(q, x.dtype), bias, low, up)

    return _run("forward", rows, q, fused, composed).view(*x.shape[:-1], q.shape[0])


def backward(dy: Tensor, q: QuantizedTensor, low: Tensor | None = None, up: Tensor | None = None) -> Tensor:
    """dy (…, N) · Ŵ + low (M, r) · up → (…, K) in dy.dtype; up (r, K)."""
    check_device("matmul_dx", dy)
    rows = dy.reshape(-1, dy.shape[-1]).contiguous()

    def fused(config: Config) -> Tensor:
        return launch_backward(rows, q, _pair(low, up), config)

    def composed() -> Tensor:
        return low_rank_product(rows, dequantize(q, dy.dtype).T, None, low, None if up is None else up.T)

    return _run("backward", rows, q, fused, composed).view(*dy.shape[:-1], q.shape[1])


def _pair(low: Tensor | None, up: Tensor | None) -> Low | None:
    return None if low is None or up is None else (low, up)


def _run(
    direction: str, rows: Tensor, q: QuantizedTensor, fused: autotune.Fused, composed: autotune.Composed
) -> Tensor:
    reason = why_unserved(q, rows.dtype, rows.device)
    if reason is not None:
        say_once(f"dequantize + torch.matmul for a weight {q.shape}: {reason}")
        return composed()
    if len(rows) == 0:
        return rows.new_zeros(0, q.shape[0 if direction == "forward" else 1])
    candidates = candidates_for(direction, q, rows.dtype, rows.device, len(rows))
    with on_device_of(rows):
        return autotune.run(direction, rows, q, candidates, fused, composed)


def why_unserved(q: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a product with q goes through dequantize and torch.matmul, or None when a fused kernel takes it."""
    if len(q.code) != 16:
        return f"{q.quant_type} codes are not two to a byte"
    if q.shape[1] % q.blocksize:
        return f"K = {q.shape[1]} is not a multiple of the block size, {q.blocksize}"
    if dtype not in FLOATS:
        return f"activations are {dtype}"
    return why_no_tensor_cores(device)


def why_no_tensor_cores(device: torch.device) -> str | None:
    """The reason, or None where Triton's dot uses them (and in the interpreter)."""
    sm = capability(device)
    return f"sm_{sm} has no tensor cores that Triton can use" if sm is not None and configs.family(sm) is None else None


def candidates_for(
    direction: str, q: QuantizedTensor, dtype: torch.dtype, device: torch.device, rows: int
) -> list[Config]:
    """Tiles worth timing for that many rows: none much taller than they are."""
    if interpreted():
        return [configs.INTERPRETED]
    if dtype == torch.float32:
        return [configs.EXACT_FP32]
    sm = capability(device)
    family = "amd" if sm is None else configs.family(sm)
    every = configs.tiles(direction, family or "mma", q.blocksize)
    return [config for config in every if 2 * rows > config.BM] or every[:1]


def launch_forward(x: Tensor, q: QuantizedTensor, bias: Tensor | None, lora: Low | None, config: Config) -> Tensor:
    """The fused product: x (M, K) contiguous. A sum cut into parts goes through a workspace and reduce_kernel."""
    (M, K), N = x.shape, q.shape[0]
    tiles = triton.cdiv(M, config.BM) * triton.cdiv(N, config.BN)
    split = configs.split_for(tiles, K // config.BK, multiprocessors(x.device))
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    parts = y if split == 1 else torch.empty(split, M, N, dtype=torch.float32, device=x.device)
    low, up = lora or (x, x)
    forward_kernel[(tiles, split)](
        x,
        *weight_arguments(q),
        low.contiguous(),
        up.contiguous(),
        x if bias is None else bias,
        parts,
        M,
        N,
        low.shape[1],
        K=K,
        HAS_BIAS=bias is not None,
        **_options(q, x, lora, split, config),
    )
    return y if split == 1 else _reduce(parts, bias, y)


def launch_backward(dy: Tensor, q: QuantizedTensor, lora: Low | None, config: Config) -> Tensor:
    """The fused product: dy (M, N) contiguous."""
    (M, N), K = dy.shape, q.shape[1]
    tiles = triton.cdiv(M, config.BM) * triton.cdiv(K, config.BK)
    split = configs.split_for(tiles, triton.cdiv(N, config.BN), multiprocessors(dy.device))
    dx = torch.empty(M, K, dtype=dy.dtype, device=dy.device)
    parts = dx if split == 1 else torch.empty(split, M, K, dtype=torch.float32, device=dy.device)
    low, up = lora or (dy, dy)
    backward_kernel[(tiles, split)](
        dy,
        *weight_arguments(q),
        low.contiguous(),
        up.contiguous(),
        parts,
        M,
        N,
        low.shape[1],
        K=K,
        **_options(q, dy, lora, split, config),
    )
    return dx if split == 1 else _reduce(parts, None, dx)


def _options(q: QuantizedTensor, x: Tensor, lora: Low | None, split: int, config: Config) -> dict[str, object]:
    return {
        "BLOCKSIZE": q.blocksize,
        "DOUBLE": q.double_quant,
        "HAS_LORA": lora is not None,
        "SPLIT": split,
        "BM": config.BM,
        "BN": config.BN,
        "BK": config.BK,
        "GROUP": GROUP,
        "ASM": scaled_lookup(q, x.dtype, x.device),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **EXACT,
    }


def _reduce(parts: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    split, M, N = parts.shape
    reduce_kernel[(triton.cdiv(M * N, REDUCE_BLOCK),)](
        parts, parts if bias is None else bias, out, M, N, HAS_BIAS=bias is not None, SPLIT=split, BLOCK=REDUCE_BLOCK
    )
    return out


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """2 in the interpreter, so that its tests cut sums too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
