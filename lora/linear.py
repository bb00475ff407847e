"""LoRALinear: a frozen linear layer W₀ with trainable low-rank updates beside it (LoRA, arXiv 2106.09685, eq. 3).

    h = W₀ x + s · B A x                   s = alpha / r

    W₀ (N, K) dense or 4-bit, frozen       A (r, K), random at the start       B (N, r), zero at the start

B = 0 makes the first forward the base model's. The gradient never reaches W₀, so W₀ needs neither a gradient nor
optimizer state: r · (N + K) numbers are trained instead of N · K.

The bias can be trained with it (LoRAConfig.bias). The adapter then has a copy of its own, so that the base keeps every
bit and is there again when the adapter is off. PEFT writes to the base's bias, and leaves it changed.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from quant import QuantizedTensor

from .config import LoRAConfig
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
        self.trained_bias = nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}

    def add(self, name: str, config: LoRAConfig, path: str) -> None:
        """Put adapter `name` on this layer, whose path in the model is `path`; it starts as no change at all."""
        r, device = config.rank(path), base_weight(self.base_layer).device
        A = torch.empty(r, self.in_features, device=device)
        if config.init == "gaussian":
            nn.init.normal_(A, std=1 / r)
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # = uniform ±1/√in_features
        self.lora_A[name] = nn.Parameter(A)
        self.lora_B[name] = nn.Parameter(torch.zeros(self.out_features, r, device=device))
        self.scaling[name] = config.scaling(path)
        self.dropout[name] = config.dropout

    def add_bias(self, name: str) -> None:
        """Give adapter `name` a trainable copy of the bias; it need not have low-rank matrices here."""
        self.trained_bias[name] = trainable_copy(self.base_layer.bias)  # type: ignore[arg-type]  # asked for where it is

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """What belongs to adapter `name` here."""
        return [held[name] for held in (self.lora_A, self.lora_B, self.trained_bias) if name in held]

    def remove(self, name: str) -> None:
        """Take adapter `name` off."""
        for held in (self.lora_A, self.lora_B, self.trained_bias, self.scaling, self.dropout):
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
        """The low-rank terms that are on now; given the layer's input x, with a dropped-out copy where one is due."""
        return [
            kernels.LoRATerm(self.lora_A[name], self.lora_B[name], self.scaling[name], self._dropped(x, name))
            for name in self.state.on
            if name in self.lora_A
        ]

    @property
    def drops(self) -> bool:
        """Whether a forward would now drop inputs of an adapter."""
        return self.training and any(self.dropout.get(name, 0) > 0 for name in self.state.on)

    def _dropped(self, x: Tensor | None, name: str) -> Tensor | None:
        p = self.dropout[name]
        return F.dropout(x, p) if x is not None and self.training and p > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        """x (…, K) → (…, N) in x.dtype."""
        return kernels.lora_matmul(x, base_weight(self.base_layer), self.terms(x), bias=self.bias)


def base_weight(layer: nn.Module) -> Tensor | QuantizedTensor:
    """W₀ as the kernels take it: (N, K) dense or quantized."""
    return layer.quantized if isinstance(layer, LinearNF4) else layer.weight  # type: ignore[return-value]


def trainable_copy(tensor: Tensor) -> nn.Parameter:
    """A parameter with the same values, in fp32 at least: in 16 bits, small steps would be lost."""
    return nn.Parameter(tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True))
