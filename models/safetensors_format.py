"""A Hugging Face folder as a checkpoint: config.json, and model.safetensors or the shards that an index names.

A weight may be stored in bitsandbytes' 4 bits, as several tensors (quant/bnb_format.py); here it is one, of the shape
that it has when dequantized, and `read_quantized` gives its codes as they are stored.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quant import QuantizedTensor, from_bnb_state_dict
from quant.bnb_format import PART, check_quantization_config, read_quant_state

from .config import DecoderConfig, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class SafetensorsFolder:
    """The tensors of a folder. Raises ValueError for a folder without them, or with files that are damaged."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder}: not a model folder: it has no config.json")
        raw = read_json(folder / "config.json")
        quantization = raw.pop("quantization_config", None)
        if quantization is not None:
            check_quantization_config(quantization, str(folder / "config.json"))
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        weight_map = _weight_map(folder) if (folder / INDEX).is_file() else {}
        paths = [folder / file for file in sorted(set(weight_map.values()))] or [_single_file(folder)]
        self._open = {path: _opened(path) for path in paths}
        for path, name in _stored_names(self._open):
            if name in self.files:
                raise ValueError(f"{self.where(name)} is in {path.name} as well")
            piece = self._open[path].get_slice(name)
            self.files[name] = path
            self.shapes[name], self._dtypes[name] = tuple(piece.get_shape()), piece.get_dtype()
        for name, file in weight_map.items():
            if self.files.get(name) != folder / file:
                raise ValueError(f"{folder / INDEX}: places {printable(name)} in {file}, which does not hold it")
        layers = raw.get("num_hidden_layers")
        if isinstance(layers, int) and layers > len(self.files):  # it takes room for each of them
            raise ValueError(f"{folder}: the config has {layers} layers, the files hold {len(self.files)} tensors")
        self.config = DecoderConfig.from_hf(raw, str(folder / "config.json"))
        self._parts = self._four_bit_parts()
        if quantization is not None and not self._parts:
            raise ValueError(f"{folder}: config.json announces 4-bit weights, and the files hold none")
        self.quant_type = self._fold_parts()
        self._check_dtypes()
        self.dtype = DTYPES.get(self._dtypes.get("model.embed_tokens.weight", "F32"), torch.float32)

    def where(self, name: str) -> str:
        return f"{self.files.get(name, self.folder)}: tensor {printable(name)}"

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start … stop (elements, of a 1-D tensor), in the stored dtype. They may lie in the mapped file."""
        return self._open[self.files[name]].get_slice(name)[start:stop]

    def read_quantized(self, name: str) -> QuantizedTensor | None:
        """The weight as its 4-bit codes, or None when it is dense. Raises ValueError when it is damaged."""
        if name not in self._parts:
            return None
        tensors = {key: self._read(key) for key in (name, *self._parts[name]) if key in self.files}
        try:
            return from_bnb_state_dict(tensors, name)
        except ValueError as error:
            raise ValueError(f"{self.files.get(name, self.folder)}: {error}") from None

    def is_quantized(self, name: str) -> bool:
        return name in self._parts

    def _read(self, name: str) -> Tensor:
        """A copy: what safetensors gives lies in the mapped file."""
        return self._open[self.files[name]].get_tensor(name).clone()

    def _four_bit_parts(self) -> dict[str, list[str]]:
        """For each 4-bit weight, the keys of the tensors beside its codes."""
        parts: dict[str, list[str]] = {}
        for key in self.files:
            if match := PART.fullmatch(key):
                parts.setdefault(match[1], []).append(key)
        return parts

    def _fold_parts(self) -> str | None:
        """Make one entry of each 4-bit weight, in its own shape. Returns the type of all of them."""
        types: set[str] = set()
        for name, keys in self._parts.items():
            states = {key: self._read(key) for key in keys if "quant_state" in key}
            try:
                state = read_quant_state(states, name)
            except ValueError as error:
                raise ValueError(f"{self.files[keys[0]]}: {error}") from None
            types.add(state["quant_type"])
            self.shapes[name] = tuple(state["shape"])
            for key in keys:
                del self.shapes[key]
        if len(types) > 1:
            raise ValueError(f"{self.folder}: holds both nf4 and fp4 weights; only one type a model is supported")
        return next(iter(types), None)

    def _check_dtypes(self) -> None:
        for name in self.shapes:
            stored = self._dtypes.get(name)
            if stored not in DTYPES and name not in self._parts:
                raise ValueError(
                    f"{self.where(name)} has dtype {stored}, which is not supported; supported: {', '.join(DTYPES)}"
                )


def printable(text: str) -> str:
    """A name from a file, fit for an error of one line."""
    return text.encode("unicode_escape").decode()[:200]


def and_more(names: list[str]) -> str:
    """For an error that shows the first of several."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _stored_names(opened: dict[Path, Any]) -> Iterator[tuple[Path, str]]:
    for path, file in opened.items():
        for name in file.keys():  # noqa: SIM118  # safe_open is no mapping
            yield path, name


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor names and files, as the index lists them. Raises ValueError when one is no file of this folder."""
    listed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{folder / INDEX}: weight_map must be an object of tensor names and files")
    weight_map = {name: str(file) for name, file in listed.items()}
    names = sorted(set(weight_map.values()))
    outside = next((name for name in names if Path(name).name != name or len(name) > 255), None)
    if outside is not None:
        raise ValueError(f"{folder / INDEX}: weight_map names {printable(outside)}, which is not a file of this folder")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder / INDEX}: names {printable(missing[0])}, which the folder lacks{and_more(missing)}")
    return weight_map


def _single_file(folder: Path) -> Path:
    if (folder / SINGLE).is_file():
        return folder / SINGLE
    pickled = next(folder.glob("*.bin"), None)
    hint = f"; {pickled.name} is a pickle, which is never read" if pickled else ""
    raise ValueError(f"{folder}: has neither {SINGLE} nor {INDEX}{hint}")


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: truncated or corrupt safetensors file: {reason}") from None
