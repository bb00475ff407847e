"""DecoderConfig: the shape of a decoder, read from a Hugging Face config.json and written back.

families.py has what the families do otherwise, rope_config.py the rotary positions. What one family calls by a name of
its own becomes a plain statement here: a window for each layer, rope or none for each layer.

Left out: every other family and every setting that changes the mathematics, refused by name.
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .families import FAMILIES, Family, read_rope_layers, read_windows, write_layers
from .fields import flag, integer, number, read_json, short, token_id, token_ids
from .rope_config import RopeConfig, read_rope, write_rope

ARCHITECTURES = tuple(FAMILIES)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (None, 0),
    "partial_rotary_factor": (None, 1),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attention_chunk_size": (None,),
    "query_pre_attn_scalar": (None,),
    "clip_qkv": (None,),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "quantization_config": (None,),
}
"""Settings that change the mathematics, with the values under which they do not."""


@dataclass(frozen=True)
class DecoderConfig:
    """Names are config.json's, but for `rope`, `windows`, `rope_layers`, `qkv_bias`, `qk_norm`."""

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
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    """lm_head is the embedding matrix itself"""
    attention_bias: bool = False
    """on q, k, v and o"""
    mlp_bias: bool = False
    qkv_bias: bool = False
    """on q, k and v alone (Qwen2)"""
    qk_norm: bool = False
    """RMSNorm over each head of q and k, before rope (Qwen3)"""
    windows: tuple[int | None, ...] = ()
    """for each layer, how many tokens a token attends to, itself included; None for all so far. () for all None"""
    rope_layers: tuple[bool, ...] = ()
    """for each layer, whether q and k are turned by rope; () for all (SmolLM3 leaves it out in some)"""
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
        architecture = _architecture(raw, where)
        family = FAMILIES[architecture]
        raw = {**family.defaults, **raw}
        _check_neutral(raw, family, where)
        heads = integer(raw, "num_attention_heads", where)
        hidden = integer(raw, "hidden_size", where)
        layers = integer(raw, "num_hidden_layers", where)
        rope_layers = read_rope_layers(raw, family, layers, where)
        config = cls(
            vocab_size=integer(raw, "vocab_size", where),
            hidden_size=hidden,
            intermediate_size=integer(raw, "intermediate_size", where),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=integer(raw, "num_key_value_heads", where, heads),
            head_dim=integer(raw, "head_dim", where, hidden // heads),
            max_position_embeddings=integer(raw, "max_position_embeddings", where, 2048),
            rms_norm_eps=number(raw, "rms_norm_eps", where, 1e-6),
            rope=read_rope(raw, where),
            tie_word_embeddings=flag(raw, "tie_word_embeddings", where),
            attention_bias="attention_bias" in family.biases and flag(raw, "attention_bias", where),
            mlp_bias="mlp_bias" in family.biases and flag(raw, "mlp_bias", where),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            windows=read_windows(raw, family, layers, rope_layers, where),
            rope_layers=rope_layers,
            initializer_range=number(raw, "initializer_range", where, 0.02),
            bos_token_id=token_id(raw, "bos_token_id", where),
            eos_token_ids=token_ids(raw, "eos_token_id", where),
            pad_token_id=token_id(raw, "pad_token_id", where),
            architecture=architecture,
        )
        config.check(where)
        return config

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def has_rope(self, layer: int) -> bool:
        return self.rope_layers[layer] if self.rope_layers else True

    def check(self, where: str = "config") -> None:
        """Raises ValueError when the sizes contradict each other, or the settings the family."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{where}: num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"{where}: head_dim must be even, since rope turns pairs; got {self.head_dim}")
        if self.architecture not in FAMILIES:
            raise ValueError(f"{where}: {_unsupported(self.architecture)}")
        for name in ("windows", "rope_layers"):
            if len(getattr(self, name)) not in (0, self.num_hidden_layers):
                raise ValueError(f"{where}: {name} must have one entry for each of the {self.num_hidden_layers} layers")
        if any(window is not None and window < 1 for window in self.windows):
            raise ValueError(f"{where}: windows must be positive, got {min(w for w in self.windows if w is not None)}")
        if wrong := self._other_family():
            raise ValueError(f"{where}: a {self.architecture} cannot have {wrong}={getattr(self, wrong)}")

    def _other_family(self) -> str | None:
        """The first setting that the architecture has no word for."""
        family, windows = FAMILIES[self.architecture], set(self.windows)
        possible = {
            "attention_bias": "attention_bias" in family.biases or not self.attention_bias,
            "mlp_bias": "mlp_bias" in family.biases or not self.mlp_bias,
            "qkv_bias": self.qkv_bias == family.qkv_bias,
            "qk_norm": self.qk_norm == family.qk_norm,
            "windows": {
                "none": windows <= {None},
                "every layer": len(windows) < 2,
                "some layers": len(windows - {None}) < 2,
            }[family.windows],
            "rope_layers": family.rope_by_layer or all(self.rope_layers),
        }
        return next((name for name, fits in possible.items() if not fits), None)

    def to_hf(self) -> dict[str, Any]:
        """The content of config.json, in the older spelling of rope."""
        family = FAMILIES[self.architecture]
        renamed = ("architecture", "rope", "eos_token_ids", "qkv_bias", "qk_norm", "windows", "rope_layers")
        foreign = {"attention_bias", "mlp_bias"} - set(family.biases)
        names = [one.name for one in fields(self) if one.name not in foreign.union(renamed)]
        eos: Any = list(self.eos_token_ids) or None
        return {
            "architectures": [self.architecture],
            "model_type": family.model_type,
            "hidden_act": "silu",
            **write_rope(self.rope),
            **write_layers(family, self.num_hidden_layers, self.windows, self.rope_layers),
            "eos_token_id": eos[0] if eos and len(eos) == 1 else eos,
            **{name: getattr(self, name) for name in names},
        }


def read_config(path: Path) -> DecoderConfig:
    """The config of a config.json. Raises ValueError when it is not valid JSON or not supported."""
    return DecoderConfig.from_hf(read_json(path), str(path))


def _architecture(raw: dict[str, Any], where: str) -> str:
    """The first of `architectures`, or the one whose model_type it is."""
    architectures = raw.get("architectures") or []
    if architectures:
        named = architectures[0] if isinstance(architectures, list) else architectures
        if not isinstance(architectures, list) or named not in ARCHITECTURES:
            raise ValueError(f"{where}: {_unsupported(named)}")
        return named
    for architecture, family in FAMILIES.items():
        if family.model_type == raw.get("model_type"):
            return architecture
    known = ", ".join(ARCHITECTURES)
    raise ValueError(
        f"{where}: model_type {raw.get('model_type')!r} without architectures is not supported; supported: {known}"
    )


def _unsupported(architecture: Any) -> str:
    return f"architecture {architecture} is not supported; supported: {', '.join(ARCHITECTURES)}"


def _check_neutral(raw: dict[str, Any], family: Family, where: str) -> None:
    known = ", ".join(ARCHITECTURES)
    absent = {"attention_bias", "mlp_bias"} - set(family.biases)
    if family.qkv_bias:
        absent.remove("attention_bias")  # it means nothing there
    for key, accepted in {**NEUTRAL, **dict.fromkeys(absent, (None, False))}.items():
        if key in raw and raw[key] not in accepted:
            shown = " or ".join(json.dumps(value) for value in accepted)
            raise ValueError(f"{where}: {key} must be {shown}, got {short(raw[key])}; supported: {known} without it")
