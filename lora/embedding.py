"""LoRAEmbedding: a frozen embedding with trainable low-rank updates beside it (LoRA, arXiv 2106.09685, eq. 3).

    h(id) = W₀[id] + s · B A[:, id]         s = alpha / r

    W₀ (V, D) frozen       A (r, V), zero at the start       B (D, r), N(0, 1) at the start

The update of the table is s · (B A)ᵀ. A token that never comes keeps its column of A at zero. The start is PEFT's:
A and B have changed places beside LoRALinear. Left out, as in PEFT: dropout, which a config may ask for.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import LoRAConfig

if TYPE_CHECKING:
    from .adapters import AdapterState


class LoRAEmbedding(nn.Module):
    """An embedding with any number of adapters by name; `state`, shared by the model's layers, says which are on."""

    def __init__(self, base_layer: nn.Embedding, state: "AdapterState") -> None:
        super().__init__()
        self.base_layer = base_layer
        self.state = state
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()
        self.scaling: dict[str, float] = {}

    @property
    def weight(self) -> Tensor:
        """W₀ (V, D): its dtype and device are the layer's."""
        return self.base_layer.weight

    def add(self, name: str, config: LoRAConfig, path: str) -> None:
        """Put adapter `name` on this layer, whose path in the model is `path`; it starts as no change at all."""
        (V, D), r, device = self.weight.shape, config.rank(path), self.weight.device
        self.lora_embedding_A[name] = nn.Parameter(torch.zeros(r, V, device=device))
        self.lora_embedding_B[name] = nn.Parameter(torch.randn(D, r, device=device))
        self.scaling[name] = config.scaling(path)

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """What belongs to adapter `name` here."""
        return [held[name] for held in (self.lora_embedding_A, self.lora_embedding_B) if name in held]

    def remove(self, name: str) -> None:
        """Take adapter `name` off."""
        for held in (self.lora_embedding_A, self.lora_embedding_B, self.scaling):
            if name in held:
                del held[name]

    @property
    def adapters(self) -> set[str]:
        """Names of the adapters that are here."""
        return set(self.lora_embedding_A)

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 (…) → (…, D) in W₀'s dtype; the sum is in the adapters' dtype, rounded once."""
        h = self.base_layer(ids)
        dtype = h.dtype
        for name in self.state.on:
            if name in self.lora_embedding_A:
                A, B = self.lora_embedding_A[name], self.lora_embedding_B[name]
                columns = F.embedding(ids, A.T, padding_idx=self.base_layer.padding_idx)  # (…, r)
                h = h + self.scaling[name] * F.linear(columns, B)
        return h.to(dtype)
