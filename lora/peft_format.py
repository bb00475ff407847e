"""Adapters in PEFT's files, written and read without PEFT. docs/formats.md lists fields and keys.

    folder/adapter_config.json          what the adapter is (lora/peft_config.py)
    folder/adapter_model.safetensors    its tensors (lora/peft_weights.py)
    folder/NAME/…                       the same two files of another adapter: several of a model, in one tree

The adapter's name is not in the files: it is chosen when loading. In a tree, the one at the top is "default".
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .adapters import adapter_layers, adapter_state, check_known, lora_layers, set_adapter
from .attach import attach, check_name
from .config import LoRAConfig, doubled
from .embedding import LoRAEmbedding
from .files import written_aside
from .init import difference
from .linear import LoRALinear
from .linear_nf4 import LinearNF4
from .peft_config import CONFIG, UNSUPPORTED, from_peft, read_config, to_peft
from .peft_weights import MAGNITUDE, PREFIX, WEIGHTS, Weights, fitted, read_weights
from .saved_module import SavedModule
from .sites import Sites, check_apart

__all__ = ["CONFIG", "UNSUPPORTED", "WEIGHTS", "load_adapter", "load_adapters", "save_adapter", "save_adapters"]

TOP = "default"
FILES = {
    CONFIG,
    WEIGHTS,
    "README.md",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
"""what an adapter's folder holds, here and where PEFT and TRL write it"""


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    name: str = "default",
    base_model_name: str | None = None,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write adapter `name` so that PEFT loads it. The folder is written aside, then takes the place of an older one.

    `beside` writes more files into the folder: a tokenizer's `save`, so that the chat template goes with the adapter.
    An adapter that started out of a dense base's weights is written as the difference to the original base, of rank 2r
    (init.difference). One on a 4-bit base belongs to that base: write it too, and name its folder as base_model_name.

    Raises ValueError for an unknown adapter, for one that belongs to a base without a name, and for a folder that holds
    anything else than an adapter: it would be lost. OSError where the folder cannot be written.
    """
    check_known(adapter_state(model), name)
    _check_replaceable(Path(folder), [])
    with written_aside(folder) as aside:
        _write(model, aside, name, base_model_name)
        if beside is not None:
            beside(aside)


def save_adapters(
    model: nn.Module,
    folder: str | Path,
    names: Sequence[str] | None = None,
    base_model_name: str | None = None,
) -> None:
    """Write several adapters, by default all, as PEFT does: "default" into `folder`, each other into folder/NAME.

    Errors are save_adapter's; a tree of other adapters than these is not replaced.
    """
    names = list(adapter_state(model).configs) if names is None else list(names)
    if not names:
        raise ValueError(f"{folder}: at least one adapter must be named to be saved")
    check_known(adapter_state(model), *names)
    _check_replaceable(Path(folder), [name for name in names if name != TOP])
    with written_aside(folder) as aside:
        for name in names:
            place = aside if name == TOP else aside / name
            place.mkdir(exist_ok=True)
            _write(model, place, name, base_model_name)


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default", *, trainable: bool = False) -> nn.Module:
    """Add the adapter in `folder` to the model under `name` and make it the active one. Returns the model.

    Raises ValueError, naming the file and the field or layer, for a missing or corrupt file, an option that changes
    the math and is not supported, or an adapter that was made for another base model; the model is then as it was.
    """
    check_name(model, name)
    found = _read(model, Path(folder))
    _put_on(model, found, name, trainable)
    return model


def load_adapters(
    model: nn.Module, folder: str | Path, names: Sequence[str] | None = None, *, trainable: bool = False
) -> list[str]:
    """Add a tree's adapters, all or those of `names`, and make the first active. Returns their names.

    Errors are load_adapter's, and ValueError for a name that the tree does not have. All are read before one is added.
    """
    folder = Path(folder)
    places = _tree(folder)
    if names is not None and not names:
        raise ValueError(f"{folder}: at least one adapter must be named to be loaded")
    chosen = list(dict.fromkeys(places if names is None else names))
    for name in chosen:
        if name not in places:
            raise ValueError(f"{folder} holds no adapter named {name!r}: it has {list(places)}")
        check_name(model, name)
    found = {name: _read(model, places[name]) for name in chosen}
    check_apart(model, [one.sites for one in found.values()])
    for name, one in found.items():
        _put_on(model, one, name, trainable)
    set_adapter(model, chosen[0])
    _set_trainable(model, chosen[0], trainable)
    return chosen


@dataclass(frozen=True)
class _Found:
    """An adapter that was read and fits the model."""

    config: LoRAConfig
    weights: Weights
    sites: Sites


def _read(model: nn.Module, folder: Path) -> _Found:
    fields = read_config(folder / CONFIG)
    config = from_peft(fields, folder / CONFIG)
    weights = read_weights(folder / WEIGHTS, config)
    if not fields.get("target_modules"):  # PEFT then has a list for the architecture; the file says what it was
        places = tuple(weights.low_rank)
        config = replace(config, target_modules=places, exclude_modules=(), layers_to_transform=None, layers_pattern=())
    try:
        where = fitted(model, weights, config, folder)
        check_apart(model, [where])
    except ValueError as error:
        raise ValueError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from None
    return _Found(config, weights, where)


@torch.no_grad()
def _put_on(model: nn.Module, found: _Found, name: str, trainable: bool) -> None:
    attach(model, found.config, name, found.sites)
    layers: dict[str, Any] = dict(adapter_layers(model))
    weights = found.weights
    for path, pair in weights.low_rank.items():
        for parameter, tensor in zip(_low_rank(layers[path], name), pair, strict=True):
            parameter.copy_(tensor)
    for path, m in weights.magnitudes.items():
        layers[path].lora_magnitude_vector[name].copy_(m)
    for path in found.sites.biases:
        layers[path].trained_bias[name].copy_(weights.biases[path])
    for path, tensors in weights.saved.items():
        layers[path].modules_to_save[name].load_state_dict(tensors)
    _set_trainable(model, name, trainable)


def _set_trainable(model: nn.Module, name: str, trainable: bool) -> None:
    for layer in adapter_layers(model).values():
        for parameter in layer.parameters_of(name):
            parameter.requires_grad_(trainable)


def _low_rank(layer: nn.Module, name: str) -> list[Tensor]:
    """A and B of adapter `name`, where it has them here."""
    embedding = isinstance(layer, LoRAEmbedding)
    halves = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    return [getattr(layer, half)[name] for half in halves if name in getattr(layer, half, ())]


def _tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What is written of adapter `name`, under PEFT's keys."""
    tensors: dict[str, Tensor] = {}
    for path, layer in adapter_layers(model).items():
        place, pair = f"{PREFIX}{path}", _low_rank(layer, name)
        if pair:
            kind, end = ("embedding_", "") if isinstance(layer, LoRAEmbedding) else ("", ".weight")
            tensors |= {f"{place}.lora_{kind}{half}{end}": tensor for half, tensor in zip("AB", pair, strict=True)}
        if isinstance(layer, LoRALinear) and name in layer.lora_magnitude_vector:
            tensors[f"{place}{MAGNITUDE}"] = layer.lora_magnitude_vector[name]
        if isinstance(layer, LoRALinear) and name in layer.trained_bias:
            tensors[f"{place}{'.base_layer' if pair else ''}.bias"] = layer.trained_bias[name]
        if isinstance(layer, SavedModule) and name in layer.modules_to_save:
            held = layer.modules_to_save[name].state_dict()
            tensors |= {f"{place}.{key}": tensor for key, tensor in held.items()}
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def _differences(model: nn.Module, name: str, base_model_name: str | None) -> dict[str, Tensor]:
    """lora_A and lora_B as differences to the original base, of an adapter that started out of dense weights."""
    tensors: dict[str, Tensor] = {}
    for path, layer in lora_layers(model).items():
        if name not in layer.started:
            continue
        if not isinstance(layer.base_layer, LinearNF4):
            A, B = difference(layer.lora_A[name], layer.lora_B[name], *layer.started[name])
            tensors |= {f"{PREFIX}{path}.lora_A.weight": A, f"{PREFIX}{path}.lora_B.weight": B}
        elif base_model_name is None:
            raise ValueError(
                f"adapter {name!r} belongs to this model's 4-bit weights, which its start has changed: "
                "save it inside without_adapters(model), and pass its folder as base_model_name"
            )
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def _write(model: nn.Module, folder: Path, name: str, base_model_name: str | None) -> None:
    targets = [path for path, layer in adapter_layers(model).items() if _low_rank(layer, name)]
    config = adapter_state(model).configs[name]
    tensors = _tensors(model, name)
    if differs := _differences(model, name, base_model_name):
        config = doubled(config)
        tensors |= differs
    try:
        safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, for one
        raise OSError(f"{folder / WEIGHTS} cannot be written: {error}") from None
    fields = to_peft(config, targets, base_model_name)
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _check_replaceable(folder: Path, below: Sequence[str]) -> None:
    """Raises ValueError when there is more in the folder than what takes its place."""
    for place, known in [(folder, FILES | set(below)), *((folder / name, FILES) for name in below)]:
        others = {path.name for path in place.iterdir()} - known if place.is_dir() else set()
        if others:
            raise ValueError(
                f"{place} must be new, empty or an adapter's folder to be written, it holds {sorted(others)}"
            )


def _tree(folder: Path) -> dict[str, Path]:
    """The folders of a tree's adapters by name, "default" first. Raises ValueError when there is none."""
    places = {TOP: folder} if (folder / CONFIG).exists() else {}
    below = {path.name: path for path in sorted(folder.iterdir()) if (path / CONFIG).is_file()}
    if places.keys() & below.keys():
        raise ValueError(f"{folder} holds two adapters named {TOP!r}: one at the top, one in {below[TOP]}")
    places |= below
    if not places:
        raise ValueError(f"{folder} holds no adapter: neither it nor a folder in it has {CONFIG}")
    return places
