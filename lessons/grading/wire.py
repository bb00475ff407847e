"""Values as bytes: JSON, with the tensors in safetensors beside it. No pickle: a student's answer is read, never run.

A message is 8 bytes of length, then as many bytes: 4 bytes of length of the JSON, the JSON, the safetensors.
"""

import json
from dataclasses import fields
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from quant import QuantizedTensor

MAX_BYTES = 1 << 28


def encode(value: Any) -> bytes:
    """Raises ValueError for a value of another type than those of this page, or one that is too large."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_plain(value, tensors)).encode()
    body = len(text).to_bytes(4, "big") + text + save(tensors)
    if len(body) > MAX_BYTES:
        raise ValueError(f"a value must not exceed {MAX_BYTES >> 20} MB, got {len(body) >> 20} MB")
    return len(body).to_bytes(8, "big") + body


def decode(body: bytes) -> Any:
    """Raises ValueError for bytes that are no message."""
    try:
        n = int.from_bytes(body[:4], "big")
        return _value(json.loads(body[4 : 4 + n]), load(body[4 + n :]))
    except Exception as error:  # whatever json and safetensors say of bytes that a program under test wrote
        raise ValueError(f"no message: {error}") from None


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, QuantizedTensor):
        return {"quantized": {f.name: _plain(getattr(value, f.name), tensors) for f in fields(value)}}
    if isinstance(value, tuple | list):
        return {type(value).__name__ if type(value) in (tuple, list) else "tuple": [_plain(v, tensors) for v in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _plain(v, tensors) for key, v in value.items()}}
    raise ValueError(f"a value must be numbers, text, tensors, or tuples, lists and dicts of them, got {type(value)}")


def _value(plain: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(plain, dict):
        return plain
    ((tag, content),) = plain.items()
    if tag == "tensor":
        return tensors[content]
    if tag == "dtype":
        return getattr(torch, content)
    if tag == "quantized":
        return QuantizedTensor(**{name: _value(v, tensors) for name, v in content.items()})
    if tag == "dict":
        return {key: _value(v, tensors) for key, v in content.items()}
    values = [_value(v, tensors) for v in content]
    return tuple(values) if tag == "tuple" else values
