"""operations: the C kernels as backend "cpu".

    quantize, dequantize    equal to quant's to the bit, for 4-bit types and fp32, bf16, fp16
    matmul, matmul_dx       x · Ŵᵀ + b and dy · Ŵ for fp32 and bf16; summed in fp32, rounded once at the end. Under bf16
                            Ŵ is rounded too where the unit multiplies pairs of bf16 numbers (avx512_bf16)

A product is served when K is a multiple of 32, so that no byte holds weights of two rows and 32 weights are decoded at
once. What is not served goes to the reference, and is told once.

Results do not depend on the number of threads, which is torch.get_num_threads(): every output is summed in index order
by one thread.
"""

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

import quant
from quant import QuantizedTensor
from quant.blockwise import BLOCKSIZES
from quant.codebook import codebook, dynamic_map
from quant.double_quant import BLOCKSIZE2
from quant.tensor import shared_map

from ..buffers import empty
from ..dispatch import register, register_backend
from ..quantize import FOUR_BIT_TYPES
from .library import (
    DTYPES,
    Library,
    Product,
    address,
    load,
    weight,
    why_missing,
    why_not,
    why_not_weight,
    workspace,
)
from .maps import map_8bit, nearest

GROUP = 32  # weights decoded at once
PRODUCT_DTYPES = (torch.float32, torch.bfloat16)


def describe() -> str:
    threads = torch.get_num_threads()
    return f"C, {load().isa}, {threads} thread{'s' if threads != 1 else ''}"


register_backend("cpu", why_missing, describe)


def _why_not_dequantize(q: QuantizedTensor, out: Tensor) -> str | None:
    return why_not(DTYPES, out) or why_not_weight(q)


def why_not_product(x: Tensor, q: QuantizedTensor, *_: object) -> str | None:
    if q.shape[1] % GROUP:
        return f"a C kernel needs K to be a multiple of {GROUP}, got {q.shape[1]}"
    return why_not(PRODUCT_DTYPES, x, strided=True) or why_not_weight(q)


def _why_not_quantize(
    values: Tensor, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True
) -> str | None:
    served = DTYPES if values.is_floating_point() else (values.dtype,)  # quantize_cpu gives the definition's error
    wrong = None if quant_type in FOUR_BIT_TYPES else f"only 4-bit types have a C kernel, not {quant_type}"
    return why_not(served, values, strided=True) or wrong


@register("dequantize", "cpu", unless=_why_not_dequantize)
def dequantize_cpu(q: QuantizedTensor, out: Tensor) -> None:
    """Fill `out` (contiguous, q.shape): both levels in one pass."""
    load().dequantize(ctypes.byref(weight(q)), out.data_ptr(), DTYPES[out.dtype], torch.get_num_threads())


@register("quantize", "cpu", unless=_why_not_quantize)
def quantize_cpu(
    values: Tensor, *, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True
) -> QuantizedTensor:
    """quant.quantize's arguments, results and errors."""
    flat = values.detach().reshape(-1).contiguous()
    if blocksize not in BLOCKSIZES or flat.numel() == 0 or flat.dtype not in DTYPES:
        return quant.quantize(
            values, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant
        )  # its error
    code = shared_map(codebook(quant_type), flat.device)
    packed = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8)
    absmax = torch.empty(-(-flat.numel() // blocksize), dtype=torch.float32)
    lib, tree, threads = load(), ctypes.byref(nearest(quant_type)), torch.get_num_threads()
    arguments = (flat.data_ptr(), DTYPES[flat.dtype], flat.numel(), blocksize, tree)
    if lib.quantize(*arguments, packed.data_ptr(), absmax.data_ptr(), threads):
        raise ValueError("quantize needs finite weights, found NaN or infinity")
    scales = _double_quantize(absmax) if double_quant else {"absmax": absmax}
    return QuantizedTensor(
        packed=packed,
        code=code,
        blocksize=blocksize,
        shape=tuple(values.shape),
        dtype=values.dtype,
        quant_type=quant_type,
        **scales,
    )


def _double_quantize(absmax: Tensor) -> dict[str, Tensor | None]:
    """The fields that hold the scales in 8 bits."""
    absmax_code = shared_map(dynamic_map(signed=True), absmax.device)
    absmax_8bit = torch.empty(absmax.numel(), dtype=torch.uint8)
    absmax2 = torch.empty(-(-absmax.numel() // BLOCKSIZE2), dtype=torch.float32)
    offset = torch.empty((), dtype=torch.float32)
    outputs = (absmax_8bit.data_ptr(), absmax2.data_ptr(), offset.data_ptr())
    second_map = ctypes.byref(map_8bit(signed=True))
    load().quantize_absmax(absmax.data_ptr(), absmax.numel(), second_map, *outputs, torch.get_num_threads())
    return {
        "absmax": None,
        "absmax_8bit": absmax_8bit,
        "absmax_code": absmax_code,
        "absmax2": absmax2,
        "absmax_offset": offset,
    }


@register("matmul", "cpu", unless=why_not_product)
def matmul_cpu(
    x: Tensor, q: QuantizedTensor, bias: Tensor | None, low: Tensor | None = None, up: Tensor | None = None
) -> Tensor:
    """x (…, K) · Ŵᵀ + bias + low (M, r) · upᵀ → (…, N); low and up (N, r) in any dtype."""
    return _product("matmul", x, q, q.shape[0], bias, low, up)


@register("matmul_dx", "cpu", unless=why_not_product)
def matmul_dx_cpu(dy: Tensor, q: QuantizedTensor, low: Tensor | None = None, up: Tensor | None = None) -> Tensor:
    """dy (…, N) · Ŵ + low (M, r) · up → (…, K); low and up (r, K) in any dtype."""
    return _product("matmul_dx", dy, q, q.shape[1], None, low, up)


def _product(
    name: str, x: Tensor, q: QuantizedTensor, outputs: int, bias: Tensor | None, low: Tensor | None, up: Tensor | None
) -> Tensor:
    x = x.contiguous()
    y = empty((*x.shape[:-1], outputs), x.dtype)
    M = y.numel() // outputs
    if M == 0:
        return y
    N, K = q.shape
    r = 0 if low is None else low.shape[1]
    if bias is not None:
        bias = bias.detach().to(x.dtype).float().contiguous()
    if low is not None and up is not None:
        low, up = low.float().contiguous(), up.float().contiguous()
    lib, threads = load(), torch.get_num_threads()
    scratch = workspace(_workspace_floats(lib, M, N, K, r, threads))
    optional = (address(bias), address(low), address(up))
    dtypes = (DTYPES[x.dtype],) * 3
    pointers = (x.data_ptr(), y.data_ptr(), *dtypes, *optional, scratch.data_ptr())
    getattr(lib, name)(ctypes.byref(Product(ctypes.pointer(weight(q)), M, N, K, r, *pointers, threads)))
    return y


@lru_cache
def _workspace_floats(lib: Library, M: int, N: int, K: int, r: int, threads: int) -> int:
    floats: int = lib.workspace_floats(M, N, K, r, threads)
    return floats
