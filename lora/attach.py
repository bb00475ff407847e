"""Attach adapters to a model: find the layers, wrap them, freeze the rest, count what is left to train."""

from collections.abc import Collection, Sequence

from torch import nn

from .adapters import AdapterState, lora_layers, set_adapter
from .config import ALL_LINEAR, LoRAConfig, matches
from .linear import LoRALinear
from .linear_nf4 import LinearNF4

HEAD = "lm_head"  # the output layer: all-linear leaves it out, as PEFT does


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

    Raises ValueError when the name is taken or not a plain word, or when the targets match no linear layer, or match
    a module that is not linear.
    """
    state = getattr(model, "adapter_state", None) or AdapterState()
    if name in state.configs:
        raise ValueError(f"an adapter named {name!r} is on this model already")
    if not name.isidentifier() or hasattr(nn.ParameterDict(), name):
        raise ValueError(f"an adapter's name must be letters, digits and _, and no method's name, got {name!r}")
    candidates = linear_layers(model)
    _check_others(model, candidates, config)
    targets = {path: layer for path, layer in candidates.items() if is_target(path, config)}
    if not targets:
        known = sorted({path.rsplit(".", 1)[-1] for path in candidates})
        raise ValueError(f"target_modules {config.target_modules!r} match no linear layer: the model has {known}")
    if not state.configs:
        model.requires_grad_(False)
    for path, layer in targets.items():
        if not isinstance(layer, LoRALinear):
            layer = LoRALinear(layer, state)  # type: ignore[arg-type]  # linear_layers yields only linear ones
            layer.train(model.training)
            replace_module(model, path, layer)
        layer.add(name, config, path)
    state.configs[name] = config
    model.adapter_state = state  # type: ignore[assignment]  # a plain attribute, not a submodule
    set_adapter(model, name)
    return model


def is_target(path: str, config: LoRAConfig) -> bool:
    """Whether the linear layer at `path` gets an adapter; the head does only when it is named."""
    return config.targets(path) and not (is_head(path) and config.target_modules == ALL_LINEAR)


def is_head(path: str) -> bool:
    return path.rsplit(".", 1)[-1] == HEAD


def _check_others(model: nn.Module, linear: Collection[str], config: LoRAConfig) -> None:
    """Raises ValueError when the targets name a module that is not linear, such as an embedding, as PEFT does."""
    if config.target_modules == ALL_LINEAR:
        return
    inside = tuple(f"{path}." for path in lora_layers(model))
    for path, module in model.named_modules():
        if path and path not in linear and not path.startswith(inside) and config.targets(path):
            raise ValueError(
                f"target_modules {config.target_modules!r} match {path} ({type(module).__name__}): "
                "only linear layers can have an adapter in this version"
            )


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer by its path: nn.Linear, LinearNF4, or the LoRALinear around one."""
    wrapped = {f"{path}.base_layer" for path in lora_layers(model)}
    kinds = (nn.Linear, LinearNF4, LoRALinear)
    return {path: m for path, m in model.named_modules() if isinstance(m, kinds) and path not in wrapped}


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` where the module at `path` is."""
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


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
