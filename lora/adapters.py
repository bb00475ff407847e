"""Which adapters are on. One AdapterState belongs to a model and is shared by all its adapter layers.

Low-rank terms of several adapters add up. A trained bias and a module saved whole take the base's place, so of the
adapters that are on together only one may have a given one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .config import LoRAConfig
from .embedding import LoRAEmbedding
from .linear import LoRALinear
from .saved_module import SavedModule

AdapterLayer = LoRALinear | LoRAEmbedding | SavedModule


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


def check_known(state: AdapterState, *names: str) -> None:
    """Raises ValueError for a name that is no adapter's of this model."""
    for name in names:
        if name not in state.configs:
            raise ValueError(f"no adapter is named {name!r}: the model has {sorted(state.configs)}")


def set_adapter(model: nn.Module, name: str | Sequence[str]) -> None:
    """Switch to adapter `name`, or to the sum of several: they are active and trainable, the others neither.

    Raises ValueError for a name the model does not have, for two adapters that replace the same thing, and for a DoRA
    adapter beside another on one layer.
    """
    state = adapter_state(model)
    names = (name,) if isinstance(name, str) else tuple(name)
    check_known(state, *names)
    layers = adapter_layers(model)
    for path, layer in layers.items():
        copies = layer.modules_to_save if isinstance(layer, SavedModule) else getattr(layer, "trained_bias", ())
        both = [adapter for adapter in dict.fromkeys(names) if adapter in copies]
        if len(both) > 1:
            what = path if isinstance(layer, SavedModule) else f"the bias of {path}"
            raise ValueError(f"adapters {both} cannot be on together: each has {what} trained in its own way")
        scaled = next((a for a in names if a in getattr(layer, "lora_magnitude_vector", ())), None)
        others = [a for a in dict.fromkeys(names) if a in layer.adapters and a != scaled]
        if scaled and others:
            raise ValueError(f"adapter {scaled!r} (DoRA) scales whole rows of {path}: {others} cannot be on beside it")
    state.active = names
    for layer in layers.values():
        for adapter in layer.adapters:
            for parameter in layer.parameters_of(adapter):
                parameter.requires_grad_(adapter in names)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Take adapter `name` off the model. A layer that has no other is the base's own again.

    Raises ValueError for a name the model does not have, and for an adapter that started out of the base's weights.
    """
    state = adapter_state(model)
    check_known(state, name)
    if any(name in layer.started for layer in lora_layers(model).values()):
        raise ValueError(f"adapter {name!r} started out of the base's weights, which miss that part: merge it instead")
    for path, layer in adapter_layers(model).items():
        layer.remove(name)
        if not layer.adapters:
            replace_module(model, path, base_of(layer))
    del state.configs[name]
    state.active = tuple(active for active in state.active if active != name)


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Every layer that holds adapters by its path, in the model's order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdapterLayer)}


def base_of(module: Any) -> Any:
    """The base's module that an adapter layer stands for; anything else as it is."""
    if isinstance(module, SavedModule):
        return module.original_module
    return module.base_layer if isinstance(module, AdapterLayer) else module


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every LoRALinear of the model by its path, in the model's order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` where the module at `path` is."""
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the base's own modules stand in the adapter layers' places, as they are: to write the base's files."""
    layers = adapter_layers(model)
    for path, layer in layers.items():
        replace_module(model, path, base_of(layer))
    try:
        yield
    finally:
        for path, layer in layers.items():
            replace_module(model, path, layer)


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
