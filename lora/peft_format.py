"""Adapters in PEFT's files, written and read without PEFT. docs/formats.md lists the keys.

    adapter_config.json         r, lora_alpha, target_modules, …
    adapter_model.safetensors   base_model.model.<path>.lora_A.weight (r, in_features)
                                base_model.model.<path>.lora_B.weight (out_features, r)

The adapter's name is not in the file: it is chosen when loading.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .adapters import adapter_state, lora_layers
from .attach import add_adapter, is_target, linear_layers
from .config import ALL_LINEAR, LoRAConfig
from .files import written_aside
from .linear import LoRALinear, base_weight

PREFIX, BASE_COPY = "base_model.model.", ".base_layer.weight"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BESIDE = {
    "README.md",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
"""what else an adapter's folder holds, here and where PEFT and TRL write it"""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
UNSUPPORTED = {
    "use_dora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "use_bdlora": None,
    "use_qalora": False,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "velora_config": None,
    "ensure_weight_tying": False,
}
"""PEFT fields that change the math and that this version does not compute, each with the value that means 'off'."""
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""init_lora_weights that leave the base as it is. An adapter of pissa, olora, corda, loftq or lora_ga belongs to a base
that its start has changed (PEFT's save_pretrained can convert it), and mica trains A alone."""


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    name: str = "default",
    base_model_name: str | None = None,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write adapter `name` so that PEFT loads it. The folder is written aside, then takes the place of an older one.

    `beside` writes more files into the folder: a tokenizer's `save`, so that the chat template goes with the adapter.
    Raises ValueError for an unknown adapter, and for a folder that holds anything else than an adapter: it would be
    lost. OSError where the folder cannot be written.
    """
    folder = Path(folder)
    state = adapter_state(model)
    if name not in state.configs:
        raise ValueError(f"no adapter is named {name!r}: the model has {sorted(state.configs)}")
    layers = {path: layer for path, layer in lora_layers(model).items() if name in layer.lora_A}
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = layer.lora_A[name].detach().cpu().contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = layer.lora_B[name].detach().cpu().contiguous()
    config = _to_peft(state.configs[name], list(layers), base_model_name)
    others = {path.name for path in folder.iterdir()} - {CONFIG, WEIGHTS, *BESIDE} if folder.is_dir() else set()
    if others:
        raise ValueError(f"{folder} must be new, empty or an adapter's folder to be written, it holds {sorted(others)}")
    with written_aside(folder) as aside:
        _write_tensors(tensors, aside / WEIGHTS)
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if beside is not None:
            beside(aside)


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default", *, trainable: bool = False) -> nn.Module:
    """Add the adapter in `folder` to the model under `name` and make it the active one. Returns the model.

    Raises ValueError, naming the file and the field or layer, for a missing or corrupt file, an option that changes
    the math and is not supported, or an adapter that was made for another base model.
    """
    folder = Path(folder)
    fields = _read_config(folder / CONFIG)
    config = _from_peft(fields, folder / CONFIG)
    tensors = _read_tensors(folder / WEIGHTS)
    _drop_base_copies(model, tensors, folder / WEIGHTS)
    pairs = _pairs(tensors, folder / WEIGHTS)
    exact = _exactly(config, pairs)
    if fields.get("layers_pattern") or not fields.get("target_modules"):
        config = exact
    _check_base(model, pairs, config, folder)
    add_adapter(model, exact, name)
    for path, layer in lora_layers(model).items():
        if path in pairs:
            with torch.no_grad():
                for parameter, tensor in zip((layer.lora_A[name], layer.lora_B[name]), pairs[path], strict=True):
                    parameter.copy_(tensor)
                    parameter.requires_grad_(trainable)
    adapter_state(model).configs[name] = config
    return model


def _exactly(config: LoRAConfig, pairs: dict[str, tuple[Tensor, Tensor]]) -> LoRAConfig:
    """The same adapter on just the layers that the file holds, with the ranks it has there."""
    return replace(config, target_modules=tuple(pairs), exclude_modules=(), layers_to_transform=None)


def _to_peft(config: LoRAConfig, paths: list[str], base_model_name: str | None) -> dict[str, Any]:
    target_modules = config.target_modules
    if target_modules == ALL_LINEAR:
        target_modules = sorted({path.rsplit(".", 1)[-1] for path in paths})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": target_modules if isinstance(target_modules, str) else list(target_modules),
        "exclude_modules": config.exclude_modules or None,
        "bias": config.bias,
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "layers_to_transform": None if config.layers_to_transform is None else list(config.layers_to_transform),
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _from_peft(fields: dict[str, Any], where: Path) -> LoRAConfig:
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type must be 'LORA', got {fields.get('peft_type')!r}")
    off_values: dict[str, tuple[Any, ...]] = {field: (off, None, [], {}) for field, off in UNSUPPORTED.items()}
    for field, off in (off_values | {"init_lora_weights": PLAIN_INITS}).items():
        if fields.get(field) not in off:
            raise ValueError(
                f"{where}: {field}={fields[field]!r} changes the math and is not supported in this version"
            )
    for field in ("r", "lora_alpha"):
        if field not in fields:
            raise ValueError(f"{where} must have the field {field!r}")
    init = "gaussian" if fields.get("init_lora_weights") == "gaussian" else "kaiming"
    layers = fields.get("layers_to_transform")
    try:
        return LoRAConfig(
            r=fields["r"],
            alpha=fields["lora_alpha"],
            dropout=fields.get("lora_dropout") or 0.0,
            target_modules=fields.get("target_modules") or ALL_LINEAR,
            exclude_modules=fields.get("exclude_modules") or (),
            bias=fields.get("bias", "none"),
            use_rslora=bool(fields.get("use_rslora")),
            init=init,
            rank_pattern=fields.get("rank_pattern") or {},
            alpha_pattern=fields.get("alpha_pattern") or {},
            layers_to_transform=[layers] if type(layers) is int else layers or None,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"an adapter folder must hold {path.name}: there is none in {path.parent}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a JSON file: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(fields).__name__}")
    return fields


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"an adapter folder must hold {path.name}: there is none in {path.parent}")
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, for one
        raise OSError(f"{path} cannot be written: {error}") from None


def _drop_base_copies(model: nn.Module, tensors: dict[str, Tensor], where: Path) -> None:
    """Take out <path>.base_layer.weight, which PEFT adds for a targeted head. It must be what this base has there."""
    layers = linear_layers(model)
    for key in [key for key in tensors if key.endswith(BASE_COPY)]:
        copy = tensors.pop(key)
        layer = layers.get(key.removeprefix(PREFIX).removesuffix(BASE_COPY))
        base = base_weight(layer.base_layer if isinstance(layer, LoRALinear) else layer) if layer else None
        if base is None or (isinstance(base, Tensor) and not torch.equal(copy.to(base), base)):
            raise ValueError(f"{where} is an adapter for another base model: {key} is not this one's weight")


def _pairs(tensors: dict[str, Tensor], where: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """{path: (A, B)}. Any key that is not one half of such a pair is an error: nothing is silently lost."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, half = key.removesuffix(".weight").rpartition(".")
        if not key.startswith(PREFIX) or half not in ("lora_A", "lora_B"):
            raise ValueError(f"{where}: key {key!r} is not a lora_A or lora_B weight, and nothing else is supported")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{where}: {key} must hold {', '.join(map(str, DTYPES))}, got {tensor.dtype}")
        halves.setdefault(path.removeprefix(PREFIX), {})[half] = tensor
    for path, found in halves.items():
        if set(found) != {"lora_A", "lora_B"}:
            raise ValueError(f"{where}: {path} must have both lora_A and lora_B, found {sorted(found)}")
    if not halves:
        raise ValueError(f"{where} holds no adapter weights")
    return {path: (found["lora_A"], found["lora_B"]) for path, found in halves.items()}


def _check_base(model: nn.Module, pairs: dict[str, tuple[Tensor, Tensor]], config: LoRAConfig, folder: Path) -> None:
    layers = linear_layers(model)
    for path, (A, B) in pairs.items():
        if path not in layers:
            raise ValueError(f"{folder} is an adapter for another base model: this one has no linear layer {path}")
        layer: Any = layers[path]
        r = config.rank(path)
        wanted = ((r, layer.in_features), (layer.out_features, r))
        if (A.shape[1:], B.shape[:1]) == (wanted[0][1:], wanted[1][:1]) and A.shape[0] == B.shape[1] != r:
            raise ValueError(f"{folder}: {path} has rank {A.shape[0]} in {WEIGHTS}, and {r} by the fields of {CONFIG}")
        if (tuple(A.shape), tuple(B.shape)) != wanted:
            raise ValueError(
                f"{folder} is an adapter for another base model: {path} needs A and B of {wanted[0]} and {wanted[1]}, "
                f"got {tuple(A.shape)} and {tuple(B.shape)}"
            )
    missing = [path for path in layers if is_target(path, config) and path not in pairs]
    if missing:
        raise ValueError(
            f"{folder} is an adapter for another base model: it has no weights for {missing[0]}, one of its targets"
        )
