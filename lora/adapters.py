"""Which adapters are on. One AdapterState belongs to a model and is shared by all its LoRALinear layers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from torch import nn

from .config import LoRAConfig
from .linear import LoRALinear


@dataclass
class AdapterState:
    """The adapters of a model, and which of them the next forward adds."""

    configs: dict[str, LoRAConfig] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    enabled: bool = True

    @property
    def on(self) -> tuple[str, ...]:
        """Names of the adapters that a forward adds now."""
        return self.active if self.enabled else ()


def adapter_state(model: nn.Module) -> AdapterState:
    """The model's AdapterState. Raises ValueError when it has no adapter."""
    state = getattr(model, "adapter_state", None)
    if state is None:
        raise ValueError("this model has no adapter: call add_adapter or load_adapter first")
    return state


def set_adapter(model: nn.Module, name: str | Sequence[str]) -> None:
    """Switch to adapter `name`, or to the sum of several: they are active and trainable, the others neither.

    Raises ValueError for a name the model does not have.
    """
    state = adapter_state(model)
    names = (name,) if isinstance(name, str) else tuple(name)
    for wanted in names:
        if wanted not in state.configs:
            raise ValueError(f"no adapter is named {wanted!r}: the model has {sorted(state.configs)}")
    state.active = names
    for layer in lora_layers(model).values():
        for adapter in layer.lora_A:
            layer.lora_A[adapter].requires_grad_(adapter in names)
            layer.lora_B[adapter].requires_grad_(adapter in names)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every LoRALinear of the model by its path, in the model's order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


@contextmanager
def disabled_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base: how DPO and GRPO get a reference model that costs nothing."""
    state = adapter_state(model)
    before, state.enabled = state.enabled, False
    try:
        yield
    finally:
        state.enabled = before


def captured_adapters(model: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """Today's choice of adapters, to be entered again later: what recomputation in backward needs."""
    state = getattr(model, "adapter_state", None)
    active, enabled = (state.active, state.enabled) if state else ((), True)

    @contextmanager
    def restored() -> Iterator[None]:
        if state is None:
            yield
            return
        before = state.active, state.enabled
        state.active, state.enabled = active, enabled
        try:
            yield
        finally:
            state.active, state.enabled = before

    return restored
