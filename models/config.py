"""DecoderConfig: the shape of a decoder, read from a Hugging Face config.json and written back.

Rotary position embedding (RoFormer, arXiv 2104.09864, §3.4.2) comes in three kinds here; attention.py has the formula.

    default    plain
    linear     every frequency divided by `factor`: positions are squeezed
    llama3     only long wavelengths divided by `factor`, short ones kept, those between interpolated (Llama 3.1)

config.json has spelled them in two ways: `rope_theta` beside `rope_scaling`, and, since transformers 5, both in
`rope_parameters`. Both are read; the older one is written, since every version reads it.

Left out: every other family and every other setting, refused by name. A family that comes later is a name in
ARCHITECTURES, its settings in DecoderConfig, and what it does differently in decoder.py.
"""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

ARCHITECTURES = ("LlamaForCausalLM",)
ROPE_TYPES = ("default", "linear", "llama3")
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (None, 0),
    "sliding_window": (None,),
    "partial_rotary_factor": (None, 1),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "quantization_config": (None,),
}
"""Settings that change the mathematics, with the values under which they do not."""


@dataclass(frozen=True)
class RopeConfig:
    rope_type: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    """linear and llama3: how much longer the context became"""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_position_embeddings / low_freq_factor are long"""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_position_embeddings / high_freq_factor are short"""
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class DecoderConfig:
    """Names are config.json's. The defaults are LlamaConfig's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    """grouped-query attention: each key-value head serves num_attention_heads / num_key_value_heads heads"""
    head_dim: int
    """need not be hidden_size / num_attention_heads"""
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    """lm_head is the embedding matrix itself"""
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    architecture: str = "LlamaForCausalLM"

    @classmethod
    def from_hf(cls, raw: dict[str, Any], where: str = "config.json") -> "DecoderConfig":
        """From the content of config.json; `where` names the file in errors.

        Raises ValueError for another architecture or rope type, a setting that is not supported, or a bad value.
        """
        _check_supported(raw, where)
        heads = _integer(raw, "num_attention_heads", where)
        hidden = _integer(raw, "hidden_size", where)
        config = cls(
            vocab_size=_integer(raw, "vocab_size", where),
            hidden_size=hidden,
            intermediate_size=_integer(raw, "intermediate_size", where),
            num_hidden_layers=_integer(raw, "num_hidden_layers", where),
            num_attention_heads=heads,
            num_key_value_heads=_integer(raw, "num_key_value_heads", where, heads),
            head_dim=_integer(raw, "head_dim", where, hidden // heads),
            max_position_embeddings=_integer(raw, "max_position_embeddings", where, 2048),
            rms_norm_eps=_number(raw, "rms_norm_eps", where, 1e-6),
            rope=_rope(raw, where),
            tie_word_embeddings=_flag(raw, "tie_word_embeddings", where),
            attention_bias=_flag(raw, "attention_bias", where),
            mlp_bias=_flag(raw, "mlp_bias", where),
            initializer_range=_number(raw, "initializer_range", where, 0.02),
            bos_token_id=_token_id(raw, "bos_token_id", where),
            eos_token_ids=_token_ids(raw, "eos_token_id", where),
            pad_token_id=_token_id(raw, "pad_token_id", where),
        )
        config.check(where)
        return config

    def check(self, where: str = "config") -> None:
        """Raises ValueError when the sizes contradict each other."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{where}: num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"{where}: head_dim must be even, since rope turns pairs; got {self.head_dim}")

    def to_hf(self) -> dict[str, Any]:
        """The content of config.json, in the older spelling of rope."""
        renamed = ("architecture", "rope", "eos_token_ids")
        same = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in renamed}
        eos: Any = list(self.eos_token_ids) or None
        return {
            "architectures": [self.architecture],
            "model_type": "llama",
            "hidden_act": "silu",
            "rope_theta": self.rope.theta,
            "rope_scaling": _rope_scaling(self.rope),
            "eos_token_id": eos[0] if eos and len(eos) == 1 else eos,
            **same,
        }


def read_config(path: Path) -> DecoderConfig:
    """The config of a config.json. Raises ValueError when it is not valid JSON or not supported."""
    return DecoderConfig.from_hf(read_json(path), str(path))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, with the line, when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # nested too deep, for one
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _check_supported(raw: dict[str, Any], where: str) -> None:
    known = ", ".join(ARCHITECTURES)
    architectures = raw.get("architectures") or []
    if architectures and (not isinstance(architectures, list) or architectures[0] not in ARCHITECTURES):
        found = architectures[0] if isinstance(architectures, list) else architectures
        raise ValueError(f"{where}: architecture {found} is not supported; supported: {known}")
    if not architectures and raw.get("model_type") != "llama":
        raise ValueError(
            f"{where}: model_type {raw.get('model_type')!r} without architectures is not supported; supported: {known}"
        )
    for key, accepted in NEUTRAL.items():
        if key in raw and raw[key] not in accepted:
            shown = " or ".join(json.dumps(value) for value in accepted)
            raise ValueError(f"{where}: {key} must be {shown}, got {_short(raw[key])}; supported: {known} without it")
    layer_types = raw.get("layer_types") or []
    other = sorted({str(kind) for kind in layer_types} - {"full_attention"})
    if other:
        raise ValueError(f"{where}: layer_types must all be full_attention, got also {', '.join(other)}")


def _rope(raw: dict[str, Any], where: str) -> RopeConfig:
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise ValueError(f"{where}: rope_parameters must be an object, got {_short(given)}")
    rope_type = given.get("rope_type", given.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"{where}: rope type {_short(rope_type)} is not supported; supported: {', '.join(ROPE_TYPES)}")
    if given.get("partial_rotary_factor") not in NEUTRAL["partial_rotary_factor"]:
        raise ValueError(f"{where}: partial_rotary_factor must be 1, got {_short(given['partial_rotary_factor'])}")
    theta = _number(given if "rope_theta" in given else raw, "rope_theta", where, 10_000.0)
    if rope_type == "default":
        return RopeConfig(theta=theta)
    if rope_type == "linear":
        return RopeConfig("linear", theta, _number(given, "factor", where))
    context = _integer(raw, "max_position_embeddings", where, 2048)
    rope = RopeConfig(
        rope_type="llama3",
        theta=theta,
        factor=_number(given, "factor", where),
        low_freq_factor=_number(given, "low_freq_factor", where),
        high_freq_factor=_number(given, "high_freq_factor", where),
        original_max_position_embeddings=_integer(given, "original_max_position_embeddings", where, context),
    )
    low, high = rope.low_freq_factor, rope.high_freq_factor
    if low >= high:
        raise ValueError(f"{where}: low_freq_factor ({low}) must be below high_freq_factor ({high})")
    return rope


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.rope_type == "default":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.rope_type, "factor": rope.factor}
    if rope.rope_type == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
        scaling["original_max_position_embeddings"] = rope.original_max_position_embeddings
    return scaling


def _integer(raw: dict[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{where}: {key} must be a positive integer, got {_found(raw, key)}")
    return value


def _number(raw: dict[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{where}: {key} must be a positive number, got {_found(raw, key)}")
    return float(value)


def _flag(raw: dict[str, Any], key: str, where: str) -> bool:
    value = raw.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"{where}: {key} must be true or false, got {_found(raw, key)}")
    return value


def _token_id(raw: dict[str, Any], key: str, where: str) -> int | None:
    value = raw.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise ValueError(f"{where}: {key} must be an integer or null, got {_found(raw, key)}")
    return value


def _token_ids(raw: dict[str, Any], key: str, where: str) -> tuple[int, ...]:
    value = raw.get(key)
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in (_token_id({key: one}, key, where) for one in values) if v is not None)


def _found(raw: dict[str, Any], key: str) -> str:
    return _short(raw[key]) if key in raw else "nothing"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
