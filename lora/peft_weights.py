"""adapter_model.safetensors: PEFT's keys, sorted by what they are, and whether they fit a model.

    base_model.model.<path>.lora_A.weight          (r, in_features)       with lora_B.weight (out_features, r)
    base_model.model.<path>.lora_embedding_A       (r, V)                 with lora_embedding_B (D, r)
    base_model.model.<path>.lora_magnitude_vector  (out_features,)        with use_dora
    base_model.model.<path>.base_layer.bias        a trained bias of a layer with A and B; of another, <path>.bias
    base_model.model.<path>.<parameter>            of a module of modules_to_save
    base_model.model.<path>.base_layer.weight      not the adapter's: a copy of the base's weight, beside an adapter on
                                                   embed_tokens or lm_head. It must be what this base has there

Any other key is an error: nothing is silently lost.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .adapters import base_of
from .config import LoRAConfig
from .linear import base_weight
from .peft_config import CONFIG, no_key_twice
from .sites import EMBEDDING, LINEAR, Sites, bias_sites, check_trainable, is_target, outer_modules

WEIGHTS, PREFIX = "adapter_model.safetensors", "base_model.model."
HALVES = {  # ending of a key: (is it an embedding's, A or B)
    ".lora_A.weight": (False, "A"),
    ".lora_B.weight": (False, "B"),
    ".lora_embedding_A": (True, "A"),
    ".lora_embedding_B": (True, "B"),
}
MAGNITUDE = ".lora_magnitude_vector"
COPIED = ("embed_tokens", "lm_head")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ELSEWHERE = "is an adapter for another base model"


@dataclass
class Weights:
    """The tensors of a file, by the path of their module."""

    low_rank: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    """Which of those paths are embeddings."""
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    """DoRA's m."""
    biases: dict[str, Tensor] = field(default_factory=dict)
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """By path, then by the parameter's name in that module."""
    base: dict[str, Tensor] = field(default_factory=dict)
    """Copies of the base's weights."""


def read_weights(path: Path, config: LoRAConfig) -> Weights:
    """The file's tensors, sorted. Raises ValueError, naming file and key, for what is corrupt or has no meaning."""
    found, halves = Weights(), dict[tuple[bool, str], dict[str, Tensor]]()
    for key, tensor in _read_tensors(path).items():
        place = key.removeprefix(PREFIX)
        ending = next((ending for ending in HALVES if place.endswith(ending)), None)
        module = _saved_module(place, config)
        owner, _, last = place.rpartition(".")
        if not key.startswith(PREFIX):
            raise ValueError(f"{path}: key {key!r} must begin with {PREFIX!r}")
        if module is not None:
            if not place.startswith((f"{module}.original_module.", f"{module}.modules_to_save.")):  # of bias="all"
                found.saved.setdefault(module, {})[place.removeprefix(f"{module}.")] = tensor
        elif ending is not None:
            is_embedding, half = HALVES[ending]
            halves.setdefault((is_embedding, place.removesuffix(ending)), {})[half] = tensor
        elif place.endswith(MAGNITUDE) and config.use_dora:
            found.magnitudes[place.removesuffix(MAGNITUDE)] = tensor
        elif last == "bias" and (config.bias == "all" or (config.bias != "none" and owner.endswith(".base_layer"))):
            found.biases[owner.removesuffix(".base_layer")] = tensor
        elif last == "weight" and owner.endswith(".base_layer"):
            found.base[owner.removesuffix(".base_layer")] = tensor
        elif last == "weight" and owner.rpartition(".")[2] in COPIED:
            found.base[owner] = tensor
        else:
            raise ValueError(
                f"{path}: key {key!r} is none of lora_A, lora_B, lora_embedding_A, lora_embedding_B, "
                "and no bias or module that the config says is trained: nothing else is supported"
            )
    for (is_embedding, place), pair in halves.items():
        names = [f"lora_{'embedding_' if is_embedding else ''}{half}" for half in "AB"]
        if set(pair) != {"A", "B"}:
            there = [name for name, half in zip(names, "AB", strict=True) if half in pair]
            raise ValueError(f"{path}: {place} must have both {names[0]} and {names[1]}, found {there}")
        found.low_rank[place] = (pair["A"], pair["B"])
        found.embeddings |= {place} if is_embedding else set()
    if not found.low_rank:
        raise ValueError(f"{path} holds no adapter weights")
    return found


def fitted(model: nn.Module, weights: Weights, config: LoRAConfig, folder: Path) -> Sites:
    """Where these weights go. Raises ValueError when something does not fit the model, or is missing for it."""
    modules: dict[str, Any] = dict(outer_modules(model))
    _check_low_rank(modules, weights, config, folder)
    _check_saved(modules, weights, config, folder)
    for path, copied in weights.base.items():
        _check_copy(modules.get(path), copied, path, folder)
    low_rank = tuple(path for path in modules if path in weights.low_rank)
    saved = tuple(path for path in modules if path in weights.saved)
    biases = bias_sites(model, config, low_rank, saved)
    for path, tensor in weights.biases.items():
        here = getattr(base_of(modules.get(path)), "bias", None)
        same = here is not None and (
            tensor.shape == here.shape if path in biases else torch.equal(tensor.to(here), here)
        )
        if not same:  # of a layer that only another adapter of the model had, PEFT adds a copy of the base's
            raise ValueError(f"{folder} {ELSEWHERE}: this one has no such bias {tuple(tensor.shape)} at {path}")
    lost = [path for path in biases if path not in weights.biases]
    if lost:
        raise ValueError(
            f"{folder}: bias is {config.bias!r} in {CONFIG}, and {WEIGHTS} has no bias for {lost[0]} (older PEFTs "
            "wrote none for lora_only): set it to 'none' to use the adapter without"
        )
    return Sites(low_rank, biases, saved)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"an adapter folder must hold {path.name}: there is none in {path.parent}")
    try:
        tensors = safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    try:
        json.loads(header, object_pairs_hook=no_key_twice)
    except ValueError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{path}: {key} must hold {', '.join(map(str, DTYPES))}, got {tensor.dtype}")
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {key} must hold finite numbers, it has NaN or infinity")
    return tensors


def _saved_module(place: str, config: LoRAConfig) -> str | None:
    """The outermost module on the way to `place` that modules_to_save names."""
    parts = place.split(".")
    paths = (".".join(parts[:n]) for n in range(1, len(parts)))
    return next((path for path in paths if config.saves(path)), None) if config.modules_to_save else None


def _check_low_rank(modules: dict[str, nn.Module], weights: Weights, config: LoRAConfig, folder: Path) -> None:
    for path, (A, B) in weights.low_rank.items():
        module = modules.get(path)
        is_embedding = path in weights.embeddings
        if module is None or not isinstance(module, EMBEDDING if is_embedding else LINEAR):
            kind = "embedding" if is_embedding else "linear layer"
            raise ValueError(f"{folder} {ELSEWHERE}: this one has no {kind} {path}")
        out, into = base_weight(base_of(module)).shape
        out, into = (into, out) if is_embedding else (out, into)
        r = config.rank(path)
        wanted = ((r, into), (out, r))
        if A.ndim == B.ndim == 2 and A.shape[1] == into and B.shape[0] == out and A.shape[0] == B.shape[1] != r:
            raise ValueError(f"{folder}: {path} has rank {A.shape[0]} in {WEIGHTS}, and {r} by the fields of {CONFIG}")
        if (tuple(A.shape), tuple(B.shape)) != wanted:
            raise ValueError(
                f"{folder} {ELSEWHERE}: {path} needs A and B of {wanted[0]} and {wanted[1]}, "
                f"got {tuple(A.shape)} and {tuple(B.shape)}"
            )
        m, wants_m = weights.magnitudes.get(path), config.use_dora
        if wants_m and (m is None or tuple(m.shape) != (out,)):
            there = "nothing" if m is None else tuple(m.shape)
            raise ValueError(f"{folder}: {path}{MAGNITUDE} must have shape {(out,)} with use_dora, found {there}")
    stray = [path for path in weights.magnitudes if path not in weights.low_rank]
    if stray:
        raise ValueError(f"{folder}: {stray[0]} has {MAGNITUDE[1:]} and neither lora_A nor lora_B")
    missing = [path for path, module in modules.items() if is_target(path, config, module)]
    missing = [path for path in missing if path not in weights.low_rank]
    if missing:
        raise ValueError(f"{folder} {ELSEWHERE}: it has no weights for {missing[0]}, one of its targets")


def _check_saved(modules: dict[str, nn.Module], weights: Weights, config: LoRAConfig, folder: Path) -> None:
    for path in [path for path in modules if config.saves(path)]:
        if path not in weights.saved:
            raise ValueError(f"{folder} {ELSEWHERE}: it has no weights for {path}, one of its modules_to_save")
    for path, tensors in weights.saved.items():
        module = modules.get(path)
        if module is None:
            raise ValueError(f"{folder} {ELSEWHERE}: this one has no module {path}, one of its modules_to_save")
        check_trainable(path, module)
        wanted = {name: tuple(tensor.shape) for name, tensor in base_of(module).state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for name in sorted(wanted.keys() | found.keys()):
            there, here = found.get(name, "missing"), wanted.get(name, "missing")
            if there != here:
                raise ValueError(f"{folder} {ELSEWHERE}: {path}.{name} is {there} in {WEIGHTS}, and {here} in this one")


def _check_copy(module: nn.Module | None, copied: Tensor, path: str, folder: Path) -> None:
    base = None if module is None else base_weight(base_of(module))
    if base is None or (isinstance(base, Tensor) and not torch.equal(copied.to(base), base)):
        raise ValueError(f"{folder / WEIGHTS} {ELSEWHERE}: {path}.base_layer.weight is not this one's weight")
