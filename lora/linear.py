"""LoRALinear: a frozen linear layer W₀ with trainable low-rank updates beside it (LoRA, arXiv 2106.09685, eq. 3).

    h = W₀ x + s · B A x                   s = alpha / r

    W₀ (N, K) dense or 4-bit, frozen       A (r, K), random at the start       B (N, r), zero at the start

B = 0 makes the first forward the base model's. The gradient never reaches W₀, so W₀ needs neither a gradient nor
optimizer state: r · (N + K) numbers are trained instead of N · K.

DoRA adds a trained length for each row (dora.py), and some starts are taken out of W₀ (init.py).

The bias can be trained with it (LoRAConfig.bias). The adapter then has a copy of its own, so that the base keeps every
bit and is there again when the adapter is off. PEFT writes to the base's bias, and leaves it changed.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from quant import QuantizedTensor

from . import dora
from .config import LoRAConfig
from .init import Start, draw
from .linear_nf4 import LinearNF4

if TYPE_CHECKING:
    from .adapters import AdapterState


class LoRALinear(nn.Module):
    """A linear layer with any number of adapters by name; `state`, shared by the model's layers, says which are on."""

    def __init__(self, base_layer: nn.Linear | LinearNF4, state: "AdapterState") -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.state = state
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.lora_magnitude_vector = nn.ParameterDict()
        """DoRA's m (N,)"""
        self.trained_bias = nn.ParameterDict()
        self.started: dict[str, tuple[Tensor, Tensor]] = {}
        """A₀ and B₀ of adapters whose start was taken out of the base's weight."""
        self._base_norms: Tensor | None = None
        self._norms: dict[str, tuple[tuple[int, ...], Tensor]] = {}
        """‖W₀ + s·BA‖ by adapter, and the state of A and B that it belongs to."""
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}

    def add(self, name: str, config: LoRAConfig, path: str) -> None:
        """Put adapter `name` on this layer, whose path in the model is `path`; it starts as no change at all."""
        r, device = config.rank(path), base_weight(self.base_layer).device
        A = torch.empty(r, self.in_features, device=device)
        draw(A, config.init)
        self.lora_A[name] = nn.Parameter(A)
        self.lora_B[name] = nn.Parameter(torch.zeros(self.out_features, r, device=device))
        self.scaling[name] = config.scaling(path)
        self.dropout[name] = config.dropout
        if config.use_dora:
            self.lora_magnitude_vector[name] = nn.Parameter(dora.row_norms(base_weight(self.base_layer)))

    def begin(self, name: str, start: Start) -> None:
        """Let adapter `name` start out of the base's weight, which keeps the rest."""
        with torch.no_grad():
            self.lora_A[name].copy_(start.A)
            self.lora_B[name].copy_(start.B)
        self.started[name] = start.A, start.B
        if isinstance(start.base, QuantizedTensor):
            self.base_layer = LinearNF4(start.base, self.base_layer.bias)
        else:
            self.base_layer.weight = nn.Parameter(start.base, requires_grad=False)

    def add_bias(self, name: str) -> None:
        """Give adapter `name` a trainable copy of the bias; it need not have low-rank matrices here."""
        self.trained_bias[name] = trainable_copy(self.base_layer.bias)  # type: ignore[arg-type]  # asked for where it is

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """What belongs to adapter `name` here."""
        holders = (self.lora_A, self.lora_B, self.lora_magnitude_vector, self.trained_bias)
        return [held[name] for held in holders if name in held]

    def remove(self, name: str) -> None:
        """Take adapter `name` off."""
        holders = (self.lora_A, self.lora_B, self.lora_magnitude_vector, self.trained_bias)
        for held in (*holders, self.scaling, self.dropout, self._norms):
            if name in held:
                del held[name]

    @property
    def adapters(self) -> set[str]:
        """Names of the adapters that are here."""
        return {*self.lora_A, *self.trained_bias}

    @property
    def bias(self) -> Tensor | None:
        """The bias that is on now."""
        trained = (self.trained_bias[name] for name in self.state.on if name in self.trained_bias)
        return next(trained, self.base_layer.bias)

    def terms(self, x: Tensor | None = None) -> list[kernels.LoRATerm]:
        """The low-rank terms that are on now; given the layer's input x, with a dropped-out copy where one is due.

        With adapters off, those that started out of the base's weight stand as they started.
        """
        if not self.state.enabled:
            device = base_weight(self.base_layer).device
            return [
                kernels.LoRATerm(A.to(device), B.to(device), self.scaling[name])
                for name, (A, B) in self.started.items()
                if name in self.state.active
            ]
        return [
            kernels.LoRATerm(self.lora_A[name], self.lora_B[name], self.scaling[name], self._dropped(x, name))
            for name in self.state.on
            if name in self.lora_A
        ]

    def row_scale(self) -> Tensor | None:
        """DoRA's c (N,) of the adapter that is on, or None."""
        name = next((name for name in self.state.on if name in self.lora_magnitude_vector), None)
        return None if name is None else dora.row_scale(self.lora_magnitude_vector[name], self._sum_norms(name))

    def _sum_norms(self, name: str) -> Tensor:
        """‖W₀ + s·BA‖ by row; in eval mode measured once for the same A and B."""
        A, B, base = self.lora_A[name].detach(), self.lora_B[name].detach(), base_weight(self.base_layer)
        if self._base_norms is None or self._base_norms.device != A.device:
            self._base_norms = dora.row_norms(base)
        state = (A._version, B._version, A.data_ptr(), B.data_ptr())
        if self.training or name not in self._norms or self._norms[name][0] != state:
            norms = dora.sum_norms(base, self._base_norms, A, B, self.scaling[name])
            self._norms[name] = state, norms
        return self._norms[name][1]

    def train(self, mode: bool = True) -> "LoRALinear":
        """nn.Module's; what was measured of A and B is measured anew, since they may have been trained in between."""
        self._norms.clear()
        return super().train(mode)

    @property
    def drops(self) -> bool:
        """Whether a forward would now drop inputs of an adapter."""
        return self.training and any(self.dropout.get(name, 0) > 0 for name in self.state.on)

    def _dropped(self, x: Tensor | None, name: str) -> Tensor | None:
        p = self.dropout[name]
        return F.dropout(x, p) if x is not None and self.training and p > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        """x (…, K) → (…, N) in x.dtype."""
        base = base_weight(self.base_layer)
        return kernels.lora_matmul(x, base, self.terms(x), bias=self.bias, row_scale=self.row_scale())


def base_weight(layer: nn.Module) -> Tensor | QuantizedTensor:
    """W₀ as the kernels take it: (N, K) dense or quantized."""
    return layer.quantized if isinstance(layer, LinearNF4) else layer.weight  # type: ignore[return-value]


def projection(layer: nn.Module) -> kernels.Projection:
    """What layer(x) multiplies x by now: for kernels that take several layers in one call."""
    if isinstance(layer, LoRALinear):
        return kernels.Projection(base_weight(layer.base_layer), layer.terms(), layer.bias, layer.row_scale())
    return kernels.Projection(base_weight(layer), (), layer.bias)  # type: ignore[arg-type]


def trainable_copy(tensor: Tensor) -> nn.Parameter:
    """A parameter with the same values, in fp32 at least: in 16 bits, small steps would be lost."""
    return nn.Parameter(tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True))
