"""LinearNF4: a frozen linear layer that holds 4-bit codes instead of a weight.

    y = x · dequantize(q)ᵀ + bias

The bytes (`packed`, and `absmax_8bit` under double quantization) are uint8 Parameters without a gradient, so that
whatever shards parameters shards them. Scales and maps are fp32 buffers, and stay fp32 under .half(), .bfloat16() and
every other cast of the module: another dtype would be another weight. The maps are one tensor for all layers, and no
part of the state dict: loading one must not write to them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import kernels
from quant import QuantizedTensor
from quant.tensor import shared_map

BYTES = ("packed", "absmax_8bit")
MAPS = ("code", "absmax_code")


class LinearNF4(nn.Module):
    """A linear layer over a 2-D QuantizedTensor of any quant_type. bias: (N,) or None, frozen too."""

    def __init__(self, q: QuantizedTensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = q.shape
        self._frame = q.with_tensors({name: torch.empty(0) for name in q.tensors()})
        self._names = tuple(q.tensors())
        self._built: tuple[list[int] | None, QuantizedTensor] | None = None
        for name, tensor in q.tensors().items():
            if name in BYTES:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor, persistent=name not in MAPS)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
    ) -> "LinearNF4":
        """Quantize weight (N, K); errors are quant.quantize's."""
        return cls(
            kernels.quantize(weight, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant), bias
        )

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight, holding this module's tensors as they are now; the same object as long as they stay in place."""
        if torch.compiler.is_compiling():  # addresses are no part of a graph
            return self._frame.with_tensors({name: getattr(self, name).detach() for name in self._names})
        parameters, buffers = self._parameters, self._buffers  # getattr would look in three places, for every token
        now: dict[str, Any] = {name: parameters[name] if name in BYTES else buffers[name] for name in self._names}
        place = [t.data_ptr() for t in now.values()] if type(now["packed"]) is nn.Parameter else None
        if place is None or self._built is None or self._built[0] != place:
            self._built = place, self._frame.with_tensors({name: t.detach() for name, t in now.items()})
        return self._built[1]

    def forward(self, x: Tensor) -> Tensor:
        """x (…, K) → (…, N) in x.dtype."""
        return kernels.matmul(x, self.quantized, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LinearNF4":
        """What .to(), .half() and their kind call: scales move to another device, and keep their dtype."""
        scales = {name: self._buffers[name] for name in self._frame.tensors() if name not in BYTES}
        self._built = None  # it holds the tensors that are about to be replaced
        super()._apply(fn, recurse)
        device = self.get_parameter("packed").device
        for name, before in scales.items():
            assert before is not None
            self._buffers[name] = shared_map(before, device) if name in MAPS else before.to(device)
        return self

    def extra_repr(self) -> str:
        frame: Any = self._frame
        form = "double-quantized" if frame.double_quant else "plain"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {frame.quant_type}, "
            f"blocksize={frame.blocksize}, {form} absmax, bias={self.bias is not None}"
        )
