"""One field of a config.json: its value, or an error that names the file, the field, the rule and what was found.

`raw` is the JSON object, `where` names the file. A field that is null counts as missing.
"""

import json
import math
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, with the line, when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # nested too deep, for one
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def integer(raw: dict[str, Any], key: str, where: str, default: int | None = None) -> int:
    """A positive integer."""
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{where}: {key} must be a positive integer, got {found(raw, key)}")
    return value


def number(raw: dict[str, Any], key: str, where: str, default: float | None = None) -> float:
    """A positive, finite number."""
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{where}: {key} must be a positive number, got {found(raw, key)}")
    return float(value)


def flag(raw: dict[str, Any], key: str, where: str, default: bool = False) -> bool:
    value = raw.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{where}: {key} must be true or false, got {found(raw, key)}")
    return value


def layer_list(raw: dict[str, Any], key: str, where: str, layers: int, accepted: tuple[Any, ...]) -> list[Any] | None:
    """A list with one of `accepted` for each layer, or None."""
    value = raw.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != layers:
        shown = f"a list of {len(value)}" if isinstance(value, list) else short(value)
        raise ValueError(f"{where}: {key} must be a list with one entry for each of the {layers} layers, got {shown}")
    other = next((entry for entry in value if entry not in accepted), None)
    if other is not None:
        known = ", ".join(str(entry) for entry in accepted)
        raise ValueError(f"{where}: {key} holds {short(other)}, which is not supported; supported: {known}")
    return value


def token_id(raw: dict[str, Any], key: str, where: str) -> int | None:
    value = raw.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise ValueError(f"{where}: {key} must be an integer or null, got {found(raw, key)}")
    return value


def token_ids(raw: dict[str, Any], key: str, where: str) -> tuple[int, ...]:
    value = raw.get(key)
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in (token_id({key: one}, key, where) for one in values) if v is not None)


def found(raw: dict[str, Any], key: str) -> str:
    return short(raw[key]) if key in raw else "nothing"


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
