"""library: the compiled kernels as Python functions of tensors.

Checks what C cannot: dtype, device, contiguity. QLORA_CPU_ISA (avx512_bf16, avx512, avx2 or portable) forces an
instruction set; by default it is the best that this processor runs.
"""

import ctypes
import os
import threading
from collections.abc import Collection
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from quant import QuantizedTensor

from .build import BuildError, build, isas

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TENSORS = ("packed", "code", "absmax", "absmax_8bit", "absmax_code", "absmax2", "absmax_offset")


class Weight(ctypes.Structure):
    """storage.h: weight."""

    _fields_ = (*((name, c_void_p) for name in TENSORS), ("numel", c_int64), ("shift", c_int64), ("shift2", c_int64))


class Product(ctypes.Structure):
    """product.h: product."""

    _fields_ = (
        ("q", POINTER(Weight)),
        *((name, c_int64) for name in ("M", "N", "K", "r")),
        ("x", c_void_p),
        ("y", c_void_p),
        *((name, c_int) for name in ("dtype", "y_dtype", "compute_dtype")),
        *((name, c_void_p) for name in ("bias", "low", "up", "workspace")),
        ("threads", c_int),
        ("dense", c_void_p),
        ("dense_dtype", c_int),
    )


class Library:
    """The functions of one instruction set."""

    def __init__(self, path: str, isa: str) -> None:
        self.isa = isa
        loaded = ctypes.CDLL(path)
        self.multiplies_pairs = bool(getattr(loaded, f"multiplies_pairs_{isa}")())
        p, n, i = c_void_p, c_int64, c_int
        signatures = {
            "dequantize": (None, [POINTER(Weight), p, i, i]),
            "quantize": (c_int, [p, i, n, n, p, p, p, i]),
            "quantize_absmax": (None, [p, n, p, p, p, p, i]),
            "adamw": (None, [p, i, p, i, p, p, n, p, i]),
            "adamw_8bit": (None, [p, i, p, i, p, p, p, p, p, p, n, p, i]),
            "adamw_pages": (c_int, [p, n, i, p, i, p, p]),
            "workspace_floats": (c_int64, [n, n, n, n, i]),
            "matmul": (None, [POINTER(Product)]),
            "matmul_dx": (None, [POINTER(Product)]),
            "rms_norm": (None, [p, i, p, c_float, n, n, p, p, i]),
            "rms_norm_dx": (None, [p, p, i, p, p, n, n, p, i]),
            "swiglu": (None, [p, p, i, n, p, i]),
            "swiglu_dx": (None, [p, p, p, i, n, p, p, i]),
            "rope": (None, [p, i, p, p, p, n, c_float, p, i]),
            "running_softmax": (None, [p, n, n, c_float, p, n, p, p, p, p, p, n, i]),
            "softmax_blocks": (None, [p, n, n, c_float, n, p, p, p, i]),
            "dense_few": (None, [p, p, i, n, n, n, p, i, i]),
            "narrow": (None, [p, p, i, n, n, n, p, i]),
            "outer": (None, [p, p, i, n, n, n, p, i]),
            "attention_floats": (c_int64, [p, i]),
            "attention": (None, [p]),
            "attention_dx": (None, [p]),
            "decode_floats": (c_int64, [p, p, n]),
            "decode": (None, [p, p, n]),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(loaded, f"{name}_{isa}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    dequantize: "ctypes._NamedFuncPointer"
    quantize: "ctypes._NamedFuncPointer"
    quantize_absmax: "ctypes._NamedFuncPointer"
    adamw: "ctypes._NamedFuncPointer"
    adamw_8bit: "ctypes._NamedFuncPointer"
    adamw_pages: "ctypes._NamedFuncPointer"
    workspace_floats: "ctypes._NamedFuncPointer"
    matmul: "ctypes._NamedFuncPointer"
    matmul_dx: "ctypes._NamedFuncPointer"
    rms_norm: "ctypes._NamedFuncPointer"
    rms_norm_dx: "ctypes._NamedFuncPointer"
    swiglu: "ctypes._NamedFuncPointer"
    swiglu_dx: "ctypes._NamedFuncPointer"
    rope: "ctypes._NamedFuncPointer"
    running_softmax: "ctypes._NamedFuncPointer"
    softmax_blocks: "ctypes._NamedFuncPointer"
    dense_few: "ctypes._NamedFuncPointer"
    narrow: "ctypes._NamedFuncPointer"
    outer: "ctypes._NamedFuncPointer"
    attention_floats: "ctypes._NamedFuncPointer"
    attention: "ctypes._NamedFuncPointer"
    attention_dx: "ctypes._NamedFuncPointer"
    decode_floats: "ctypes._NamedFuncPointer"
    decode: "ctypes._NamedFuncPointer"


@lru_cache
def why_missing() -> str | None:
    """None when the kernels run here, else the reason in one line. Compiles them if that was never done."""
    try:
        load()
    except (BuildError, OSError, AttributeError) as error:
        return f"the C kernels are not available: {' '.join(str(error).split())}"
    return None


def load() -> Library:
    """The kernels for the instruction set that is asked for now. Raises BuildError; ValueError for QLORA_CPU_ISA."""
    return _load(os.environ.get("QLORA_CPU_ISA", ""))


@lru_cache
def _load(asked: str) -> Library:
    path = build()
    usable = usable_isas(path)
    if asked and asked not in usable:
        raise ValueError(f"QLORA_CPU_ISA must be one of {', '.join(usable)} on this machine, got {asked!r}")
    return Library(str(path), asked or usable[-1])


def usable_isas(library: Path) -> tuple[str, ...]:
    """The instruction sets of a compiled library that this processor runs, the fastest last."""
    loaded = ctypes.CDLL(str(library))
    compiled = [isa for isa in isas() if hasattr(loaded, f"matmul_{isa}")]
    return tuple(isa for isa in compiled if isa == "portable" or getattr(loaded, f"runs_{isa}")())


def why_not(served: Collection[torch.dtype], *tensors: Tensor, strided: bool = False) -> str | None:
    """Why C cannot take these tensors, or None: it reads CPU memory, of these dtypes, contiguous unless `strided`."""
    for tensor in tensors:
        if tensor.device.type != "cpu" or not (strided or tensor.is_contiguous()):
            return f"a C kernel needs {'' if strided else 'contiguous '}CPU tensors"
        if tensor.dtype not in served:
            return f"a C kernel serves {', '.join(map(str, served))}, not {tensor.dtype}"
    return None


def weight(q: QuantizedTensor) -> Weight:
    """Pointers to q's tensors now (sharding may move their storage between two calls), valid as long as q is."""
    first_level = (q.packed.data_ptr(), q.code.data_ptr(), address(q.absmax))
    second_level = (address(q.absmax_8bit), address(q.absmax_code), address(q.absmax2), address(q.absmax_offset))
    shifts = (q.blocksize.bit_length() - 1, q.blocksize2.bit_length() - 1)
    return Weight(*first_level, *second_level, q.numel, *shifts)


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def why_not_weight(q: QuantizedTensor) -> str | None:
    """Why C cannot read q, or None. Found once for each q."""
    try:
        return _readable[q]
    except KeyError:
        _readable[q] = _why_not_readable(q)
    return _readable[q]


_readable: WeakKeyDictionary[QuantizedTensor, str | None] = WeakKeyDictionary()


def _why_not_readable(q: QuantizedTensor) -> str | None:
    if len(q.code) != 16:
        return f"only 4-bit types have a C kernel, not {q.quant_type}"
    return why_not((torch.uint8, torch.float32), *q.tensors().values())


_own = threading.local()


def workspace(floats: int) -> Tensor:
    """This thread's scratch memory, kept between calls: fresh pages would cost more than the work on them."""
    held: Tensor | None = getattr(_own, "held", None)
    if held is None or held.numel() < floats:
        held = _own.held = torch.empty(floats, dtype=torch.float32)
    return held
