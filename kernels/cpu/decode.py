"""decode: the layers of a decoder for one new token a row, in one C call (decode.h)."""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p, pointer

import torch
from torch import Tensor

from quant import QuantizedTensor

from ..decode import DecodeStep, Entries, Layer, Shape
from ..grouped_lora_matmul import Projection
from .library import DTYPES, Weight, load, weight, why_missing, why_not_weight, workspace
from .operations import GROUP, PRODUCT_DTYPES


class CProjection(ctypes.Structure):
    """decode.h: projection."""

    _fields_ = (
        ("q", POINTER(Weight)),
        *((name, c_int64) for name in ("N", "K", "r")),
        *((name, c_void_p) for name in ("bias", "down", "up")),
    )


class CLayer(ctypes.Structure):
    """decode.h: decoder_layer."""

    _fields_ = (
        *((name, CProjection) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        *((name, c_void_p) for name in ("keys", "values", "slots", "counts")),
        *((name, c_int64) for name in ("size", "rope")),
    )


class CStep(ctypes.Structure):
    """decode.h: decode_step."""

    _fields_ = (
        *((name, c_int64) for name in ("R", "D", "H", "Kv", "Dh", "inner", "longest")),
        ("eps", c_float),
        *((name, c_int) for name in ("dtype", "threads")),
        *((name, c_void_p) for name in ("x", "cos", "sin", "workspace")),
    )


def decode_step(layers: Sequence[Layer], shape: Shape) -> DecodeStep | None:
    """As kernels.decode.decode_step."""
    if why_missing() or shape.dtype not in PRODUCT_DTYPES:
        return None
    served = all(_serves(p) for layer in layers for p in layer.projections)
    return _Step(layers, shape) if served else None


def _serves(p: Projection) -> bool:
    q = p.base
    if not isinstance(q, QuantizedTensor) or q.shape[1] % GROUP or p.row_scale is not None:
        return False
    return why_not_weight(q) is None and all(term.x is None for term in p.adapters)


class _Step:
    """The layers as C reads them, with the tensors that it points to."""

    def __init__(self, layers: Sequence[Layer], shape: Shape) -> None:
        self.shape = shape
        self.held: list[Tensor | QuantizedTensor] = []
        self.layers = (CLayer * len(layers))(*(self._layer(layer) for layer in layers))
        self.inner = layers[0].projections[-1].base.shape[1]

    def _layer(self, layer: Layer) -> CLayer:
        norms = [self._numbers(gain) for gain in (*layer.norms, *(layer.head_norms or (None, None)))]
        return CLayer(*(self._projection(p) for p in layer.projections), *norms, rope=layer.has_rope)

    def _projection(self, p: Projection) -> CProjection:
        q = p.base
        assert isinstance(q, QuantizedTensor)
        self.held.append(q)
        down = up = None
        if p.adapters:
            down = torch.cat([term.A for term in p.adapters])
            up = torch.cat([term.scaling * term.B for term in p.adapters], dim=1)
        r = 0 if down is None else len(down)
        return CProjection(pointer(weight(q)), *q.shape, r, *(self._numbers(t) for t in (p.bias, down, up)))

    def _numbers(self, tensor: Tensor | None) -> int | None:
        """The address of `tensor` in fp32, which is kept."""
        if tensor is None:
            return None
        kept = tensor.detach().float().contiguous()
        self.held.append(kept)
        return kept.data_ptr()

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, entries: Sequence[Entries]) -> None:
        H, Kv, Dh, eps, dtype = self.shape
        cos, sin = cos.contiguous(), sin.contiguous()
        for layer, (keys, values, slots, counts) in zip(self.layers, entries, strict=True):
            layer.keys, layer.values, layer.size = keys.data_ptr(), values.data_ptr(), keys.shape[2]
            layer.slots, layer.counts = slots.data_ptr(), counts.data_ptr()
        longest = max(entry.keys.shape[2] for entry in entries)
        step = CStep(*x.shape, H, Kv, Dh, self.inner, longest, eps, DTYPES[dtype], torch.get_num_threads())
        step.x, step.cos, step.sin = x.data_ptr(), cos.data_ptr(), sin.data_ptr()
        lib, arguments = load(), (ctypes.byref(step), self.layers, len(self.layers))
        scratch = workspace(lib.decode_floats(*arguments))
        step.workspace = scratch.data_ptr()
        lib.decode(*arguments)
