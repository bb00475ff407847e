"""SavedModule: a module of the base, and for each adapter a copy of it that is trained whole (PEFT's modules_to_save).

What low rank does not suit is trained in full beside the adapters: the head or the embeddings after new tokens came
in, or the norms. The copy is the adapter's: the base keeps every bit, and is there again when the adapter is off.

The copy of a tied head is a matrix of its own. While its adapter is on, the embeddings no longer follow the head.
"""

import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

import kernels

from .linear import trainable_copy

if TYPE_CHECKING:
    from .adapters import AdapterState


class SavedModule(nn.Module):
    """Stands where `original_module` was; runs the copy of the adapter that is on, or else the original."""

    def __init__(self, original_module: nn.Module, state: "AdapterState") -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.state = state

    @property
    def weight(self) -> Tensor:
        """The original's weight: its dtype and device are the base's."""
        return self.original_module.weight  # type: ignore[return-value]

    def add(self, name: str) -> None:
        """Give adapter `name` a trainable copy, equal to the original at the start, in fp32 at least."""
        twin = copy.deepcopy(self.original_module)
        for module in twin.modules():
            for key, parameter in module.named_parameters(recurse=False):
                setattr(module, key, trainable_copy(parameter))
        self.modules_to_save[name] = twin

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """What belongs to adapter `name` here."""
        return list(self.modules_to_save[name].parameters()) if name in self.modules_to_save else []

    def remove(self, name: str) -> None:
        """Take adapter `name` off."""
        if name in self.modules_to_save:
            del self.modules_to_save[name]

    @property
    def adapters(self) -> set[str]:
        """Names of the adapters that are here."""
        return set(self.modules_to_save)

    @property
    def now(self) -> nn.Module:
        """The copy that is on, or the original."""
        copies = (self.modules_to_save[name] for name in self.state.on if name in self.modules_to_save)
        return next(copies, self.original_module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's. A linear layer casts its weight to x.dtype, as everywhere."""
        module = self.now
        if isinstance(module, nn.Linear):
            return kernels.linear(args[0], module.weight, module.bias)
        return module(*args, **kwargs)


def in_use(module: nn.Module) -> nn.Module:
    """What a forward of `module` runs now: of a SavedModule the copy that is on, or its original."""
    return module.now if isinstance(module, SavedModule) else module
