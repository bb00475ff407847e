"""bitsandbytes' 4-bit state dict, read and written without bitsandbytes. docs/formats.md draws it byte by byte.

For a weight called `name` (say `model.layers.0.mlp.up_proj.weight`):

    name                                       uint8 (⌈n/2⌉, 1)    packed codes
    name.absmax                                uint8 (n_blocks,)    with double quantization, else fp32
    name.quant_map                             fp32 (16,)           the code book
    name.nested_absmax                         fp32 (⌈n_blocks/256⌉,)  }
    name.nested_quant_map                      fp32 (256,)             } double quantization only
    name.quant_state.bitsandbytes__nf4         uint8 (length,)      JSON in UTF-8: type, sizes, dtype, shape, offset

Only nf4 and fp4 exist there. A folder that transformers writes holds such weights and says so in config.json, under
`quantization_config`; every weight carries its own sizes, so that reading needs no more of it than its method.
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from .blockwise import BLOCKSIZES
from .codebook import codebook
from .double_quant import BLOCKSIZE2
from .tensor import QuantizedTensor, shared_map

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FIELDS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_FIELDS = {"nested_blocksize", "nested_dtype", "nested_offset"}
_STATE_BYTES = 1 << 20  # bitsandbytes writes some 170
PART = re.compile(r"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__(?:nf4|fp4))")
"""The key of any tensor beside a weight's packed codes; group 1 is the weight's name."""


def to_bnb_state_dict(q: QuantizedTensor, name: str) -> dict[str, Tensor]:
    """The tensors bitsandbytes would save for this weight. Raises ValueError for a quant_type or dtype it lacks."""
    dtype = str(q.dtype).removeprefix("torch.")
    if q.quant_type not in ("nf4", "fp4"):
        raise ValueError(f"bitsandbytes stores nf4 and fp4 weights, got {q.quant_type!r} for {name}")
    if dtype not in _DTYPES:
        raise ValueError(f"bitsandbytes stores float32, float16 and bfloat16 weights, got {dtype} for {name}")
    state: dict[str, Any] = {
        "quant_type": q.quant_type,
        "blocksize": q.blocksize,
        "dtype": dtype,
        "shape": list(q.shape),
    }
    tensors = {name: q.packed.view(-1, 1), f"{name}.quant_map": q.code.clone()}
    if q.double_quant:
        parts = q.tensors()
        tensors[f"{name}.absmax"] = parts["absmax_8bit"]
        tensors[f"{name}.nested_absmax"] = parts["absmax2"]
        tensors[f"{name}.nested_quant_map"] = parts["absmax_code"].clone()
        state["nested_blocksize"] = q.blocksize2
        state["nested_dtype"] = "float32"
        state["nested_offset"] = parts["absmax_offset"].item()
    else:
        tensors[f"{name}.absmax"] = q.scales()
    text = json.dumps(state).encode()
    tensors[f"{name}.quant_state.bitsandbytes__{q.quant_type}"] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors


def from_bnb_state_dict(tensors: Mapping[str, Tensor], name: str) -> QuantizedTensor:
    """The weight `name` of a bitsandbytes state dict, to the bit.

    Raises ValueError, naming the key, for a missing tensor, a field that is absent or unknown, a size that does not
    follow from the shape, a code book that is not the one its type has, or scales that are NaN or infinite.
    """
    state = read_quant_state(tensors, name)
    quant_type = state["quant_type"]
    shape = tuple(state["shape"])
    n = math.prod(shape)
    n_blocks = -(-n // state["blocksize"])

    packed = _get(tensors, name).contiguous().view(-1).view(torch.uint8)  # quant_storage may be another dtype
    _check_size(name, packed, -(-n // 2), torch.uint8)
    scales: dict[str, Any] = {"absmax": _get(tensors, f"{name}.absmax").view(-1)}
    nested = "nested_offset" in state
    _check_size(f"{name}.absmax", scales["absmax"], n_blocks, torch.uint8 if nested else torch.float32)
    if nested:
        absmax2 = _get(tensors, f"{name}.nested_absmax").view(-1)
        _check_size(f"{name}.nested_absmax", absmax2, -(-n_blocks // state["nested_blocksize"]), torch.float32)
        scales = {
            "absmax": None,
            "absmax_8bit": scales["absmax"],
            "absmax_code": _stored_map(tensors, f"{name}.nested_quant_map"),
            "absmax2": absmax2,
            "absmax_offset": torch.tensor(state["nested_offset"], dtype=torch.float32, device=packed.device),
            "blocksize2": state["nested_blocksize"],
        }
    q = QuantizedTensor(
        packed=packed,
        code=_known_map(tensors, f"{name}.quant_map", codebook(quant_type)),
        blocksize=state["blocksize"],
        shape=shape,
        dtype=_DTYPES[state["dtype"]],
        quant_type=quant_type,
        **scales,
    )
    if not torch.isfinite(q.scales()).all():
        raise ValueError(f"{name}.absmax holds NaN or infinity")
    return q


def read_quant_state(tensors: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """The JSON beside the weight `name`: quant_type, blocksize, dtype, shape and, nested, three fields more. Checked.

    Raises ValueError, naming the key, when it is missing or is not what bitsandbytes writes.
    """
    quant_type = _quant_type(tensors, name)
    key = f"{name}.quant_state.bitsandbytes__{quant_type}"
    state = _read_state(tensors[key], key)
    if state["quant_type"] != quant_type:
        raise ValueError(f"{key} must hold quant_type {quant_type!r}, got {state['quant_type']!r}")
    return state


def to_quantization_config(
    quant_type: str, double_quant: bool, compute_dtype: torch.dtype, skip_modules: list[str] | None
) -> dict[str, Any]:
    """`quantization_config` of config.json, as transformers writes it.

    skip_modules: the linear layers that are dense; None says that it is the output layer alone.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": skip_modules,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }


def check_quantization_config(config: Any, where: str) -> None:
    """Raises ValueError unless `quantization_config` announces bitsandbytes' 4-bit weights."""
    if not isinstance(config, dict):
        raise ValueError(f"{where}: quantization_config must be an object, got {type(config).__name__}")
    method = config.get("quant_method", "bitsandbytes")  # old files name none
    if method != "bitsandbytes" or config.get("load_in_4bit") is not True:
        found = "bitsandbytes without load_in_4bit" if method == "bitsandbytes" else repr(method)[:60]
        raise ValueError(f"{where}: quantization {found} is not supported; supported: bitsandbytes with load_in_4bit")


def _quant_type(tensors: Mapping[str, Tensor], name: str) -> str:
    found = [t for t in ("nf4", "fp4") if f"{name}.quant_state.bitsandbytes__{t}" in tensors]
    if len(found) != 1:
        keys = f"{name}.quant_state.bitsandbytes__nf4 or __fp4"
        raise ValueError(f"a 4-bit weight needs exactly one of {keys}, found {len(found)}")
    return found[0]


def _read_state(tensor: Tensor, key: str) -> dict[str, Any]:
    if tensor.numel() > _STATE_BYTES:
        raise ValueError(f"{key} must hold at most {_STATE_BYTES} bytes of JSON, got {tensor.numel()}")
    try:
        state = json.loads(bytes(tensor.cpu().tolist()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{key} must hold JSON in UTF-8: {error}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{key} must hold a JSON object, got {type(state).__name__}")
    wanted = _FIELDS | _NESTED_FIELDS if _NESTED_FIELDS & set(state) else _FIELDS
    if set(state) != wanted:
        raise ValueError(f"{key} must hold the fields {sorted(wanted)}, got {sorted(state)}")
    _check_field(key, state, "blocksize", _is_one_of(state["blocksize"], BLOCKSIZES), f"one of {BLOCKSIZES}")
    _check_field(key, state, "dtype", _is_one_of(state["dtype"], _DTYPES), f"one of {sorted(_DTYPES)}")
    shape = state["shape"]
    is_shape = isinstance(shape, list) and len(shape) > 0 and all(type(d) is int and d > 0 for d in shape)
    _check_field(key, state, "shape", is_shape, "a list of positive whole numbers")
    if "nested_offset" in state:
        _check_field(
            key, state, "nested_blocksize", _is_one_of(state["nested_blocksize"], (BLOCKSIZE2,)), str(BLOCKSIZE2)
        )
        _check_field(key, state, "nested_dtype", state["nested_dtype"] == "float32", "'float32'")
        offset = state["nested_offset"]
        is_number = type(offset) in (int, float) and abs(offset) <= torch.finfo(torch.float32).max
        _check_field(key, state, "nested_offset", is_number, "a finite fp32 number")
    return state


def _check_field(key: str, state: dict[str, Any], field: str, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"{key}: {field} must be {rule}, got {state[field]!r}")


def _is_one_of(value: Any, allowed: Collection[Any]) -> bool:
    """value in allowed, and of the same type: JSON's 64.0 is no block size."""
    return isinstance(value, (int, str)) and value in allowed


def _get(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise ValueError(f"a 4-bit weight needs the tensor {key}, which is missing")
    return tensors[key]


def _check_size(key: str, tensor: Tensor, size: int, dtype: torch.dtype) -> None:
    if tensor.numel() != size or tensor.dtype != dtype:
        raise ValueError(f"{key} must hold {size} {dtype} values, got {tensor.numel()} of {tensor.dtype}")


def _known_map(tensors: Mapping[str, Tensor], key: str, levels: Tensor) -> Tensor:
    """The code book we derive, once the file's is found equal. (bitsandbytes goes by the type alone.)"""
    stored = _get(tensors, key)
    if stored.dtype != torch.float32 or not torch.equal(stored.cpu().view(-1), levels):
        raise ValueError(f"{key} must be the {len(levels)} levels of its type, and differs from them")
    return shared_map(levels, stored.device)


def _stored_map(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    """The file's 8-bit map, which is what bitsandbytes dequantizes with; equal maps share one tensor."""
    stored = _get(tensors, key).view(-1)
    _check_size(key, stored, 256, torch.float32)
    if not torch.isfinite(stored).all():
        raise ValueError(f"{key} must hold finite levels, found NaN or infinity")
    return shared_map(stored, stored.device)
