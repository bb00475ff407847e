"""adapter_config.json: PEFT's LoraConfig, read and written. docs/formats.md has an example.

A field that changes the math is computed or refused by name. Any other is ignored: it says how training went.
"""

import json
import stat
from pathlib import Path
from typing import Any

from .config import ALL_LINEAR, LoRAConfig, shown

CONFIG = "adapter_config.json"
MAX_BYTES = 1 << 22
UNSUPPORTED = {
    "lora_bias": False,
    "fan_in_fan_out": False,
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
HARMLESS = ("use_rslora", "use_dora", "runtime_config", "megatron_config")
HARMLESS_INITS = ("loftq_config", "eva_config", "corda_config", "lora_ga_config")
"""Settings of a start: init_lora_weights says whether that start matters."""


def to_peft(config: LoRAConfig, targets: list[str], base_model_name: str | None) -> dict[str, Any]:
    """The fields of a config whose low-rank matrices sit on `targets`, paths."""
    names: Any = config.target_modules
    if names == ALL_LINEAR:
        names = sorted({path.rsplit(".", 1)[-1] for path in targets})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": _list(names),
        "exclude_modules": _list(config.exclude_modules) or None,
        "bias": config.bias,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "layers_to_transform": None if config.layers_to_transform is None else list(config.layers_to_transform),
        "layers_pattern": _list(config.layers_pattern) or None,
        "modules_to_save": _list(config.modules_to_save) or None,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def from_peft(fields: dict[str, Any], where: Path) -> LoRAConfig:
    """The config of these fields. Raises ValueError, naming file and field, for what cannot be computed as it says."""
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type must be 'LORA', got {shown(fields.get('peft_type'))}")
    _refuse_other_math(fields, where)
    for field in ("r", "lora_alpha"):
        if field not in fields:
            raise ValueError(f"{where} must have the field {field!r}")
    if fields.get("use_rslora") not in (True, False, None):
        raise ValueError(f"{where}: LoRA use_rslora must be true or false, got {shown(fields['use_rslora'])}")
    if fields.get("use_dora") not in (True, False, None):
        raise ValueError(f"{where}: LoRA use_dora must be true or false, got {shown(fields['use_dora'])}")
    layers = fields.get("layers_to_transform")
    try:
        return LoRAConfig(
            r=fields["r"],
            alpha=fields["lora_alpha"],
            dropout=_or(fields.get("lora_dropout"), 0.0),
            target_modules=fields.get("target_modules") or ALL_LINEAR,
            exclude_modules=_or(fields.get("exclude_modules"), ()),
            bias=_or(fields.get("bias"), "none"),
            use_rslora=bool(fields.get("use_rslora")),
            use_dora=bool(fields.get("use_dora")),
            init="gaussian" if fields.get("init_lora_weights") == "gaussian" else "kaiming",
            rank_pattern=_or(fields.get("rank_pattern"), {}),
            alpha_pattern=_or(fields.get("alpha_pattern"), {}),
            layers_to_transform=[layers] if type(layers) is int else layers,
            modules_to_save=_or(fields.get("modules_to_save"), ()),
            layers_pattern=_or(fields.get("layers_pattern"), ()),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def read_config(path: Path) -> dict[str, Any]:
    """The fields of the file. Raises ValueError for a missing, malformed or oversized one; OSError as open does."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            raise ValueError(f"a file of at most {MAX_BYTES} bytes is wanted, this has {status.st_size}")
        fields = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_key_twice)
    except FileNotFoundError:
        raise ValueError(f"an adapter folder must hold {path.name}: there is none in {path.parent}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a JSON file: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(fields).__name__}")
    return fields


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json's object_pairs_hook. Raises ValueError where readers would differ on which value counts."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return fields


def _refuse_other_math(fields: dict[str, Any], where: Path) -> None:
    off_values: dict[str, tuple[Any, ...]] = {field: (off, None, [], {}) for field, off in UNSUPPORTED.items()}
    for field, off in (off_values | {"init_lora_weights": PLAIN_INITS}).items():
        if fields.get(field) not in off:
            raise ValueError(
                f"{where}: {field}={shown(fields[field])} changes the math and is not supported in this version"
            )
    for field, value in fields.items():
        is_switch = field.startswith("use_") or field.endswith("_config")
        if is_switch and field not in (*UNSUPPORTED, *HARMLESS, *HARMLESS_INITS) and value not in (None, False, [], {}):
            raise ValueError(f"{where}: {field}={shown(value)} is not known to this version and may change the math")


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _list(names: Any) -> Any:
    """A regex as it is, names as a list."""
    return names if isinstance(names, str) else list(names)
