"""A Hugging Face folder as a checkpoint: config.json, and model.safetensors or the shards that an index names."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import read_config, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class SafetensorsFolder:
    """The tensors of a folder. Raises ValueError for a folder without them, or with files that are damaged."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder}: not a model folder: it has no config.json")
        self.config = read_config(folder / "config.json")
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._open: dict[Path, Any] = {}
        for path in _weight_files(folder):
            opened = self._open[path] = _opened(path)
            for name in opened.keys():  # noqa: SIM118  # safe_open is no mapping
                piece = opened.get_slice(name)
                self.files[name] = path
                self.shapes[name], self._dtypes[name] = tuple(piece.get_shape()), piece.get_dtype()
        for name, stored in self._dtypes.items():
            if stored not in DTYPES:
                raise ValueError(
                    f"{self.where(name)} has dtype {stored}, which is not supported; supported: {', '.join(DTYPES)}"
                )
        first = self._dtypes.get("model.embed_tokens.weight", "F32")
        self.dtype = DTYPES[first]

    def where(self, name: str) -> str:
        return f"{self.files.get(name, self.folder)}: tensor {name}"

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start … stop (elements, of a 1-D tensor), in the stored dtype. They may lie in the mapped file."""
        return self._open[self.files[name]].get_slice(name)[start:stop]


def and_more(names: list[str]) -> str:
    """For an error that shows the first of several."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        listed = read_json(folder / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise ValueError(f"{folder / INDEX}: weight_map must be an object of tensor names and files")
        names = sorted({str(file) for file in listed.values()})
        outside = next((name for name in names if Path(name).name != name), None)
        if outside is not None:
            raise ValueError(f"{folder / INDEX}: weight_map names {outside}, which is not a file of this folder")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder / INDEX}: names {missing[0]}, which the folder lacks{and_more(missing)}")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickled = next(folder.glob("*.bin"), None)
    hint = f"; {pickled.name} is a pickle, which is never read" if pickled else ""
    raise ValueError(f"{folder}: has neither {SINGLE} nor {INDEX}{hint}")


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: truncated or corrupt safetensors file: {reason}") from None
