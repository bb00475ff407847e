"""RopeConfig: the settings of the rotary position embedding, read from a config.json and written back.

Rotary position embedding (RoFormer, arXiv 2104.09864, §3.4.2) comes in four kinds here; attention.py has the formulas.

    default    plain
    linear     every frequency divided by `factor`: positions are squeezed
    llama3     only long wavelengths divided by `factor`, short ones kept, those between interpolated (Llama 3.1)
    yarn       the same idea with another ramp, and q and k scaled (YaRN, arXiv 2309.00071; Qwen2.5's long contexts)

config.json has spelled them in two ways: `rope_theta` beside `rope_scaling`, and, since transformers 5, both in
`rope_parameters`. Both are read; the older one is written, since every version reads it.

Left out, refused by name: dynamic NTK, longrope, frequencies by kind of layer, rotation of a part of the head.
"""

from dataclasses import dataclass
from itertools import chain
from math import log
from typing import Any

from .fields import flag, integer, number, short

FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "attention_factor"),
}
"""The fields of RopeConfig that each type has, under their names in config.json."""
ROPE_TYPES = tuple(FIELDS)
READ_ONLY = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "mscale", "mscale_all_dim")
KEYS = tuple(dict.fromkeys((*READ_ONLY, *chain.from_iterable(FIELDS.values()))))


@dataclass(frozen=True)
class RopeConfig:
    rope_type: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    """linear, llama3, yarn: how much longer the context became"""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_position_embeddings / low_freq_factor are long"""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_position_embeddings / high_freq_factor are short"""
    original_max_position_embeddings: int = 8192
    """llama3, yarn: the context before"""
    beta_fast: float = 32.0
    """yarn: pairs that turn more often than this within the original context keep their frequency"""
    beta_slow: float = 1.0
    """yarn: pairs that turn less often than this have it divided by `factor`"""
    truncate: bool = True
    """yarn: the ends of the ramp between the two lie on whole numbers"""
    attention_factor: float | None = None
    """yarn: what q and k are multiplied by; None for the paper's 0.1 · ln(factor) + 1"""


def read_rope(raw: dict[str, Any], where: str) -> RopeConfig:
    """From the content of config.json. Raises ValueError for a type, a key or a value that is not supported."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise ValueError(f"{where}: rope_parameters must be an object, got {short(given)}")
    rope_type = given.get("rope_type", given.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"{where}: rope type {short(rope_type)} is not supported; supported: {', '.join(ROPE_TYPES)}")
    other = next((key for key in given if key not in KEYS), None)
    if other is not None:
        raise ValueError(f"{where}: rope_parameters holds {short(other)}, not supported; supported: {', '.join(KEYS)}")
    if given.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(f"{where}: partial_rotary_factor must be 1, got {short(given['partial_rotary_factor'])}")
    theta = number(given if given.get("rope_theta") is not None else raw, "rope_theta", where, 10_000.0)
    if rope_type == "linear":
        return RopeConfig("linear", theta, number(given, "factor", where))
    if rope_type == "llama3":
        return _read_llama3(raw, given, theta, where)
    if rope_type == "yarn":
        return _read_yarn(raw, given, theta, where)
    return RopeConfig(theta=theta)


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """rope_theta and rope_scaling of a config.json."""
    held = {name: getattr(rope, name) for name in FIELDS[rope.rope_type]}
    scaling = {name: value for name, value in held.items() if value is not None}
    return {"rope_theta": rope.theta, "rope_scaling": {"rope_type": rope.rope_type} | scaling if scaling else None}


def _original_context(raw: dict[str, Any], given: dict[str, Any], where: str) -> int:
    context = integer(raw, "max_position_embeddings", where, 2048)
    return integer(given, "original_max_position_embeddings", where, context)


def _read_llama3(raw: dict[str, Any], given: dict[str, Any], theta: float, where: str) -> RopeConfig:
    low, high = number(given, "low_freq_factor", where), number(given, "high_freq_factor", where)
    if low >= high:
        raise ValueError(f"{where}: low_freq_factor ({low}) must be below high_freq_factor ({high})")
    return RopeConfig(
        rope_type="llama3",
        theta=theta,
        factor=number(given, "factor", where),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=_original_context(raw, given, where),
    )


def _read_yarn(raw: dict[str, Any], given: dict[str, Any], theta: float, where: str) -> RopeConfig:
    fast, slow = number(given, "beta_fast", where, 32.0), number(given, "beta_slow", where, 1.0)
    if slow >= fast:
        raise ValueError(f"{where}: beta_slow ({slow}) must be below beta_fast ({fast})")
    if theta == 1.0:
        raise ValueError(f"{where}: rope_theta must not be 1 with yarn, since all pairs would turn equally fast")
    factor = number(given, "factor", where)
    attention_factor = None
    if given.get("attention_factor") is not None:
        attention_factor = number(given, "attention_factor", where)
    elif given.get("mscale") and given.get("mscale_all_dim"):
        over, under = (_mscale(factor, number(given, key, where)) for key in ("mscale", "mscale_all_dim"))
        attention_factor = over / under
    return RopeConfig(
        rope_type="yarn",
        theta=theta,
        factor=factor,
        original_max_position_embeddings=_original_context(raw, given, where),
        beta_fast=fast,
        beta_slow=slow,
        truncate=flag(given, "truncate", where, True),
        attention_factor=attention_factor,
    )


def _mscale(factor: float, weight: float) -> float:
    """0.1 · weight · ln(factor) + 1, and 1 where nothing is stretched."""
    return 0.1 * weight * log(factor) + 1.0 if factor > 1 else 1.0


def yarn_scale(rope: RopeConfig) -> float:
    """What yarn multiplies q and k by."""
    return _mscale(rope.factor, 1.0) if rope.attention_factor is None else rope.attention_factor
