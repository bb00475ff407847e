"""A safetensors file written and read a piece at a time, so that no tensor is ever whole in memory.

    8 bytes    length of the header, little-endian
    header     JSON: {"name": {"dtype": "F32", "shape": […], "data_offsets": [begin, end]}, …, "__metadata__": {…}}
    data       the tensors without gaps; offsets count from here

The library of that name checks the header of a file that is read; only the bytes of the tensors are fetched here.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {"F32": torch.float32, "F64": torch.float64, "U8": torch.uint8}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class StateFileWriter:
    """Tensors of a file that is being written, in any order of their pieces."""

    def __init__(self, file: FileIO, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Any) -> None:
        self.file, self.begin = file, dict[str, int]()
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
        at = 0
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):  # keeps alignment
            end = at + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
            self.begin[name], at = at, end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.data = 8 + len(text)
        write_all(file, len(text).to_bytes(8, "little") + text)
        file.truncate(self.data + at)

    def write(self, name: str, first: int, values: Tensor) -> None:
        """Values (n,) as elements first … of a tensor."""
        self.file.seek(self.data + self.begin[name] + first * values.element_size())
        write_all(self.file, values.cpu().contiguous().view(torch.uint8).numpy().data)


@contextmanager
def write_state_file(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]
) -> Iterator[StateFileWriter]:
    """A writer for a new file that holds these tensors. What is never written is zeros. Raises OSError."""
    with open(path, "wb", buffering=0) as file:
        yield StateFileWriter(file, tensors, metadata)


class StateFile:
    """A file's tensors, to be read a piece at a time. Raises ValueError, naming the file, if it is no safetensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt"):
                self.file = open(path, "rb", buffering=0)  # noqa: SIM115  # open until __exit__
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        length = int.from_bytes(self.file.read(8), "little")
        header = json.loads(self.file.read(length))
        self.data, self.metadata = 8 + length, header.pop("__metadata__", {})
        self.tensors: dict[str, dict[str, Any]] = header

    def __enter__(self) -> "StateFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def check(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless the file has that tensor with this dtype and shape."""
        found = self.tensors.get(name)
        if found is None or (DTYPES.get(found["dtype"]), tuple(found["shape"])) != (dtype, shape):
            what = "nothing" if found is None else f"{found['dtype']} {tuple(found['shape'])}"
            raise ValueError(f"{self.path}: {name} must be {NAMES[dtype]} with shape {shape}, found {what}")

    def read(self, name: str, first: int, values: Tensor) -> Tensor:
        """Fill values (n,) with elements first … of a tensor, and return them."""
        self.file.seek(self.data + self.tensors[name]["data_offsets"][0] + first * values.element_size())
        host = values if values.device.type == "cpu" else torch.empty_like(values, device="cpu")
        left = host.view(torch.uint8).numpy().data
        while left:
            n_bytes = self.file.readinto(left)
            if not n_bytes:
                raise ValueError(f"{self.path} ends inside {name}")
            left = left[n_bytes:]
        return values if host is values else values.copy_(host)


def write_all(file: FileIO, data: "bytes | memoryview") -> None:
    """A raw file may take less than it is given."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]
