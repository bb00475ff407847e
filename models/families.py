"""The families: what each of them does otherwise, and what its config.json means where it says nothing.

             biases                            q/k norm   sliding window            layers without rope
    Llama    attention_bias, mlp_bias          no         none                      none
    Mistral  none                              no         every layer               none
    Qwen2    q, k, v, always                   no         layer_types, or those     none
                                                          from max_window_layers
    Qwen3    attention_bias                    yes        the same                  none
    SmolLM3  attention_bias, mlp_bias          no         layer_types, or those     no_rope_layers, or every
                                                          without rope              no_rope_layer_interval-th

Qwen2 stands for Qwen2.5 too, Llama for Llama 2, 3, 3.1 and 3.2. Names of modules and tensors are the same in all of
them; Qwen3 adds q_norm and k_norm. `no_rope_layers` is a list of 0 (no rope) and 1 (rope), whatever its name says.
Qwen and SmolLM3 read their windows only where `use_sliding_window` is true.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .fields import flag, integer, layer_list, short

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Family:
    model_type: str
    biases: tuple[str, ...] = ()
    """the settings by which its layers get biases"""
    qkv_bias: bool = False
    qk_norm: bool = False
    windows: str = "none"
    """none | every layer | some layers"""
    rope_by_layer: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """what transformers takes for a field that config.json lacks, where it differs from Llama"""


QWEN_DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
FAMILIES = {
    "LlamaForCausalLM": Family("llama", biases=("attention_bias", "mlp_bias")),
    "MistralForCausalLM": Family(
        "mistral",
        windows="every layer",
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True, windows="some layers", defaults=QWEN_DEFAULTS),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        biases=("attention_bias",),
        qk_norm=True,
        windows="some layers",
        defaults=QWEN_DEFAULTS | {"head_dim": 128},
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        biases=("attention_bias", "mlp_bias"),
        windows="some layers",
        rope_by_layer=True,
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
        },
    ),
}


def read_rope_layers(raw: dict[str, Any], family: Family, layers: int, where: str) -> tuple[bool, ...]:
    """Which layers turn q and k by rope; () for all of them."""
    if not family.rope_by_layer:
        return ()
    given = layer_list(raw, "no_rope_layers", where, layers, (0, 1))
    if given is None:
        interval = integer(raw, "no_rope_layer_interval", where)
        given = [(layer + 1) % interval != 0 for layer in range(layers)]
    return () if all(given) else tuple(bool(turns) for turns in given)


def read_windows(
    raw: dict[str, Any], family: Family, layers: int, rope_layers: tuple[bool, ...], where: str
) -> tuple[int | None, ...]:
    """The window of each layer, None where it attends to everything before; () when all do."""
    window = _window(raw, family, where)
    given = layer_list(raw, "layer_types", where, layers, (FULL, SLIDING))
    if family.windows == "some layers":
        types = given or _default_types(raw, family, layers, window, rope_layers, where)
    else:
        types = [SLIDING if window else FULL] * layers
        other = sorted(set(given or types) - set(types))
        if other:
            raise ValueError(f"{where}: layer_types must all be {types[0]}, got also {', '.join(other)}")
    if SLIDING in types and window is None:
        raise ValueError(
            f"{where}: layer_types holds {SLIDING}, but there is no window: "
            "it takes sliding_window, and use_sliding_window true"
        )
    return tuple(window if kind == SLIDING else None for kind in types) if SLIDING in types else ()


def _window(raw: dict[str, Any], family: Family, where: str) -> int | None:
    """The window of the layers that slide. A family without one must not name one."""
    if family.windows == "none":
        if raw.get("sliding_window") is not None:
            found, kind = short(raw["sliding_window"]), family.model_type
            raise ValueError(f"{where}: sliding_window must be null, got {found}: a {kind} model has no window")
        return None
    if family.windows == "some layers" and not flag(raw, "use_sliding_window", where):
        return None
    return None if raw.get("sliding_window") is None else integer(raw, "sliding_window", where)


def _default_types(
    raw: dict[str, Any], family: Family, layers: int, window: int | None, rope_layers: tuple[bool, ...], where: str
) -> list[str]:
    if window is None:
        return [FULL] * layers
    if family.rope_by_layer:
        return [FULL if turns else SLIDING for turns in rope_layers or [True] * layers]
    first = raw.get("max_window_layers")
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise ValueError(f"{where}: max_window_layers must be an integer from 0, got {short(first)}")
    return [SLIDING if layer >= first else FULL for layer in range(layers)]


def write_layers(
    family: Family, layers: int, windows: tuple[int | None, ...], rope_layers: tuple[bool, ...]
) -> dict[str, Any]:
    """The fields of config.json that say what read_windows and read_rope_layers read."""
    if family.windows == "none":
        return {}
    window = next((window for window in windows if window is not None), None)
    if family.windows == "every layer":
        return {"sliding_window": window}
    types = [FULL if window is None else SLIDING for window in windows or (None,) * layers]
    written: dict[str, Any] = {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": types,
    }
    if family.rope_by_layer:
        written["no_rope_layers"] = [int(turns) for turns in rope_layers or (True,) * layers]
    else:  # for readers from before layer_types
        written["max_window_layers"] = types.index(SLIDING) if SLIDING in types else layers
    return written
