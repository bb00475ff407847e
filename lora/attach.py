"""Attach adapters to a model: wrap the layers, freeze the rest, count what is left to train."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

import kernels
from quant import QuantizedTensor

from .adapters import AdapterLayer, AdapterState, lora_layers, replace_module, set_adapter
from .config import LoRAConfig, matches
from .embedding import LoRAEmbedding
from .init import Start, start_from_weight, takes_from_weight
from .linear import LoRALinear, base_weight
from .linear_nf4 import LinearNF4
from .saved_module import SavedModule
from .sites import HEAD, Sites, linear_layers, outer_modules, sites

__all__ = [
    "HEAD",
    "add_adapter",
    "attach",
    "check_name",
    "count_parameters",
    "linear_layers",
    "quantize_model",
    "replace_module",
    "trainable_parameters",
]


def quantize_model(
    model: nn.Module,
    *,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    skip: Sequence[str] = (HEAD,),
) -> nn.Module:
    """Replace every nn.Linear outside `skip` (paths or last parts) by a LinearNF4, one at a time. Returns the model."""
    for path, layer in linear_layers(model).items():
        if isinstance(layer, nn.Linear) and not matches(skip, path):
            bias = None if layer.bias is None else layer.bias.data
            options = {"quant_type": quant_type, "blocksize": blocksize, "double_quant": double_quant}
            replace_module(model, path, LinearNF4.from_weight(layer.weight.data, bias, **options))  # type: ignore[arg-type]
    return model


def add_adapter(model: nn.Module, config: LoRAConfig, name: str = "default") -> nn.Module:
    """Put a new adapter on every target, freeze everything else, and make it the active one. Returns the model.

    Raises ValueError when the name is taken or not a plain word, and for targets, biases or modules_to_save that the
    model does not have or that cannot be trained so (lora/sites.py); the model is then as it was.
    """
    check_name(model, name)
    if config.init == "loftq":
        raise ValueError("init loftq fits adapter and 4-bit weight together: call add_adapter_in_4bit on a dense model")
    found = sites(model, config)
    _warn_of_tied(model, found)
    attach(model, config, name, found)
    if takes_from_weight(config.init):
        _take_start(model, config, name, found, None)
    return model


def add_adapter_in_4bit(
    model: nn.Module,
    config: LoRAConfig,
    name: str = "default",
    *,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
) -> dict[str, Start]:
    """add_adapter with a start out of the weights, and quantize_model, in one: the 4-bit layers keep what is left.

    For a dense model and a config whose init is pissa, olora or loftq. Every linear layer but the head ends in 4 bits.
    Returns the starts by path, with the error before and after. Errors are add_adapter's, and ValueError for another
    init or where a target is in 4 bits already.
    """
    if not takes_from_weight(config.init):
        raise ValueError(
            f"add_adapter_in_4bit is for pissa, olora and loftq, got {config.init}: quantize_model is enough"
        )
    check_name(model, name)
    found = sites(model, config)
    in_4bit = [path for path in found.low_rank if isinstance(model.get_submodule(path), LinearNF4)]
    if in_4bit:
        raise ValueError(f"init {config.init} starts from the original weights, and {in_4bit[0]} is in 4 bits already")
    attach(model, config, name, found)
    form: dict[str, Any] = {"quant_type": quant_type, "blocksize": blocksize, "double_quant": double_quant}
    starts = _take_start(model, config, name, found, partial(kernels.quantize, **form))
    quantize_model(model, **form)
    return starts


def _take_start(
    model: nn.Module, config: LoRAConfig, name: str, where: Sites, quantize: Callable[[Tensor], QuantizedTensor] | None
) -> dict[str, Start]:
    starts = {}
    for path in where.low_rank:
        layer: LoRALinear = model.get_submodule(path)  # type: ignore[assignment]  # sites allow no other
        base = base_weight(layer.base_layer)
        again = partial(_quantize_like, base) if isinstance(base, QuantizedTensor) else quantize
        weight = kernels.dequantize(base) if isinstance(base, QuantizedTensor) else base
        r, scaling, iterations = config.rank(path), config.scaling(path), config.loftq_iterations
        starts[path] = start_from_weight(weight, config.init, r, scaling, again, loftq_iterations=iterations)
        layer.begin(name, starts[path])
    return starts


def _quantize_like(q: QuantizedTensor, weight: Tensor) -> QuantizedTensor:
    return kernels.quantize(
        weight.to(q.dtype), quant_type=q.quant_type, blocksize=q.blocksize, double_quant=q.double_quant
    )


def attach(model: nn.Module, config: LoRAConfig, name: str, where: Sites) -> None:
    """add_adapter, once it is known where: for sites that have been checked."""
    state = getattr(model, "adapter_state", None) or AdapterState()
    if not state.configs:
        model.requires_grad_(False)
    for path in where.low_rank:
        _wrapped(model, path, state).add(name, config, path)
    for path in where.biases:
        _wrapped(model, path, state).add_bias(name)
    for path in where.saved:
        _saved(model, path, state).add(name)
    state.configs[name] = config
    model.adapter_state = state  # type: ignore[assignment]  # a plain attribute, not a submodule
    set_adapter(model, name)


def check_name(model: nn.Module, name: str) -> None:
    """Raises ValueError for a name that is taken, or that cannot be a module's and a folder's name."""
    state = getattr(model, "adapter_state", None)
    if state is not None and name in state.configs:
        raise ValueError(f"an adapter named {name!r} is on this model already")
    other = next((other for layer in lora_layers(model).values() for other in layer.started), None)
    if other is not None:
        raise ValueError(f"adapter {other!r} started out of this model's weights, so no other can be beside it")
    is_word = name.replace("-", "_").isidentifier() and not name.startswith("-")
    if not is_word or hasattr(nn.ParameterDict(), name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"an adapter's name must be letters, digits and _ or -, and no method's name, got {name!r}")


def _wrapped(model: nn.Module, path: str, state: AdapterState) -> Any:
    """The layer at `path`, in a LoRALinear or LoRAEmbedding if it was in none."""
    layer = model.get_submodule(path)
    if isinstance(layer, AdapterLayer):
        return layer
    kind: Any = LoRAEmbedding if isinstance(layer, nn.Embedding) else LoRALinear
    return _put(model, path, kind(layer, state))


def _saved(model: nn.Module, path: str, state: AdapterState) -> SavedModule:
    """The SavedModule at `path`, made around what was there if it was none."""
    module = model.get_submodule(path)
    return module if isinstance(module, SavedModule) else _put(model, path, SavedModule(module, state))


def _put(model: nn.Module, path: str, layer: Any) -> Any:
    layer.train(model.training)
    replace_module(model, path, layer)
    return layer


def _warn_of_tied(model: nn.Module, where: Sites) -> None:
    """As PEFT: an adapter on one of two layers that share a weight changes that one alone."""
    owners: dict[int, list[str]] = {}
    for path, module in outer_modules(model):
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            owners.setdefault(id(weight), []).append(path)
    for paths in owners.values():
        touched = [path for path in paths if path in (*where.low_rank, *where.saved)]
        if len(paths) > 1 and touched:
            warnings.warn(
                f"{' and '.join(paths)} share one weight in this model: the adapter changes {' and '.join(touched)}, "
                "each on its own, and they are no longer tied while it is on",
                stacklevel=3,
            )


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(path, Parameter) of everything that requires a gradient, in the model's order."""
    return [(path, p) for path, p in model.named_parameters() if p.requires_grad]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total). A 4-bit weight counts by its shape, whatever bytes hold it; a tied weight counts once."""
    packed = {
        id(p)
        for m in model.modules()
        if isinstance(m, LinearNF4)
        for p in (m.packed, getattr(m, "absmax_8bit", m.packed))
    }
    in_4bit = sum(m.quantized.numel for m in model.modules() if isinstance(m, LinearNF4))
    dense = sum(p.numel() for p in model.parameters() if id(p) not in packed)
    return sum(p.numel() for _, p in trainable_parameters(model)), in_4bit + dense
