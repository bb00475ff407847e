"""Where an adapter sits: PEFT's rules, applied to a model.

    low_rank   linear layers and embeddings that get A and B       target_modules, exclude_modules, layers_to_transform
    biases     linear layers whose bias is trained                 bias: all of them, or those among low_rank
    saved      modules that are trained whole                      modules_to_save

What a rule names and cannot have is refused: an adapter never sits somewhere else than it says.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from .adapters import AdapterLayer, adapter_layers, base_of
from .config import ALL_LINEAR, LoRAConfig
from .embedding import LoRAEmbedding
from .init import takes_from_weight
from .linear import LoRALinear
from .linear_nf4 import LinearNF4
from .saved_module import SavedModule

HEAD = "lm_head"  # the output layer: all-linear leaves it out, as PEFT does
LINEAR = (nn.Linear, LinearNF4, LoRALinear)
EMBEDDING = (nn.Embedding, LoRAEmbedding)
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True)
class Sites:
    """Paths of modules, each in the model's order."""

    low_rank: tuple[str, ...]
    biases: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()


def sites(model: nn.Module, config: LoRAConfig) -> Sites:
    """Where an adapter of this config sits on this model.

    Raises ValueError when the targets match no layer, or one that is neither linear nor an embedding, or when a name
    of modules_to_save matches nothing, or something that cannot be trained whole.
    """
    _check_others(model, config)
    low_rank = tuple(path for path, module in outer_modules(model) if is_target(path, config, module))
    if not low_rank:
        known = sorted({path.rsplit(".", 1)[-1] for path in linear_layers(model)})
        raise ValueError(f"target_modules {config.target_modules!r} match no linear layer: the model has {known}")
    for name in config.modules_to_save:
        if not any(path.endswith(name) for path, _ in outer_modules(model)):
            raise ValueError(f"modules_to_save: no module's path ends in {name!r}")
    saved = tuple(path for path, _ in outer_modules(model) if config.saves(path))
    found = Sites(low_rank, bias_sites(model, config, low_rank, saved), saved)
    check_apart(model, [found])
    _check_variant(model, config, low_rank)
    return found


def _check_variant(model: nn.Module, config: LoRAConfig, low_rank: Iterable[str]) -> None:
    """Raises ValueError where use_dora or a start out of the weights asks for what a layer cannot do."""
    from_weight = takes_from_weight(config.init)
    if not (config.use_dora or from_weight):
        return
    what = "use_dora" if config.use_dora else f"init {config.init}"
    for path in low_rank:
        module = base_of(model.get_submodule(path))
        if isinstance(module, nn.Embedding) or path.rpartition(".")[2] == HEAD:
            raise ValueError(f"{what} is for linear layers inside the model, not for {path}")
        N, K, r = module.out_features, module.in_features, config.rank(path)
        if from_weight and r > min(N, K):
            raise ValueError(f"{what} needs r of at most {min(N, K)} for {path} {(N, K)}, got {r}")


def is_target(path: str, config: LoRAConfig, module: nn.Module) -> bool:
    """Whether the targets name the module at `path`; all-linear means linear layers other than the head."""
    if config.target_modules == ALL_LINEAR and (path.rsplit(".", 1)[-1] == HEAD or not isinstance(module, LINEAR)):
        return False
    return config.targets(path)


def bias_sites(model: nn.Module, config: LoRAConfig, low_rank: Iterable[str], saved: Iterable[str]) -> tuple[str, ...]:
    """Linear layers whose bias this config trains; a module saved whole has its own. ValueError for other biases."""
    if config.bias == "none":
        return ()
    inside_saved = tuple(f"{path}." for path in saved)
    found = []
    for path, module in outer_modules(model):
        base = module.base_layer if isinstance(module, LoRALinear) else module
        if getattr(base, "bias", None) is None or f"{path}.".startswith(inside_saved):
            continue
        if isinstance(module, LINEAR):
            found.append(path)
        elif config.bias == "all" and isinstance(base.bias, nn.Parameter):
            kind = type(module).__name__
            raise ValueError(f"bias='all' would train {path}.bias ({kind}): only linear layers' biases are supported")
    return tuple(path for path in found if config.bias == "all" or path in set(low_rank))


def check_apart(model: nn.Module, new: Iterable[Sites]) -> None:
    """Raises ValueError when a module that is saved whole is, or holds, one with low-rank matrices or in 4 bits."""
    new = list(new)
    layers = adapter_layers(model)
    saved = {path for found in new for path in found.saved}
    all_saved = saved | {path for path, layer in layers.items() if isinstance(layer, SavedModule)}
    low_rank = {path for found in new for path in (*found.low_rank, *found.biases)}
    low_rank |= {path for path, layer in layers.items() if not isinstance(layer, SavedModule)}
    for path in sorted(all_saved):
        inside = sorted(other for other in low_rank | all_saved - {path} if f"{other}.".startswith(f"{path}."))
        if inside:
            raise ValueError(
                f"modules_to_save: {path} would be trained whole, and has an adapter at {inside[0]}: only one can be"
            )
    for path in sorted(saved):
        check_trainable(path, model.get_submodule(path))


def outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every module but the root and what lies inside an adapter's layer, shared ones each time."""
    inside = tuple(f"{path}." for path in adapter_layers(model))
    for path, module in model.named_modules(remove_duplicate=False):
        if path and not path.startswith(inside):
            yield path, module


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer by its path: nn.Linear, LinearNF4, or the LoRALinear around one."""
    return {path: module for path, module in outer_modules(model) if isinstance(module, LINEAR)}


def _check_others(model: nn.Module, config: LoRAConfig) -> None:
    """Raises ValueError when the targets name a module that can have no low-rank adapter, as PEFT does."""
    for path, module in outer_modules(model):
        if isinstance(module, (*LINEAR, *EMBEDDING)):
            continue
        original = module.original_module if isinstance(module, SavedModule) else None
        if is_target(path, config, module if original is None else original):
            kind = type(module).__name__ if original is None else "trained whole by another adapter"
            raise ValueError(
                f"target_modules {config.target_modules!r} match {path} ({kind}): "
                "only linear layers and embeddings can have a low-rank adapter"
            )


def check_trainable(path: str, module: nn.Module) -> None:
    """Raises ValueError when the module at `path` cannot be trained whole."""
    if isinstance(module, SavedModule):
        return
    if isinstance(module, (*CONTAINERS, AdapterLayer)):
        raise ValueError(f"modules_to_save: {path} is a {type(module).__name__}, which is not run as a module")
    if any(isinstance(inner, LinearNF4) for inner in module.modules()):
        raise ValueError(f"modules_to_save: {path} is in 4 bits, and what is trained whole must be dense")
    if not any(True for _ in module.parameters()):
        raise ValueError(f"modules_to_save: {path} ({type(module).__name__}) has no parameters to train")
