"""GGUF, llama.cpp's one-file format: the header, and tensors decoded a few rows at a time.

    "GGUF"  u32 version  u64 n_tensors  u64 n_metadata
    metadata   n × (string key, u32 type, value)                   string = u64 length, utf-8 bytes
    tensors    n × (string name, u32 n_dims, u64 dims…, u32 ggml type, u64 offset)     the fastest dimension first
    padding to general.alignment (32), then the tensors' bytes, each at its offset

All numbers little-endian. The header is read here and not with gguf.GGUFReader, which makes four numpy objects of
every string: on SmolLM2's vocabulary that took 2.7 s and 160 MB, here 0.2 s and 12 MB. Decoding the block formats is
gguf.dequantize's.

Left out: version 1, big-endian files, and files split in several.
"""

import math
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""ggml types that are plain numbers"""


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]
    """in torch's order: rows first"""
    ggml_type: int
    offset: int
    """from the start of the file"""
    row_bytes: int
    """of one row, that is of the last dimension"""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class GGUFHeader:
    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> GGUFHeader:
    """Metadata and tensor table. Raises ValueError when the file is no GGUF file, damaged, or cut short."""
    with open(path, "rb") as file:
        reader = _Reader(file, path)
        if reader.take(4) != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file: it does not start with the bytes GGUF")
        version = reader.scalar("I")
        if version not in (2, 3):
            raise ValueError(f"{path}: GGUF version must be 2 or 3 (little-endian), found {version}")
        n_tensors, n_metadata = reader.count(), reader.count()
        metadata: dict[str, Any] = {}
        for _ in range(n_metadata):
            key = reader.name()
            if key in metadata:
                raise ValueError(f"{path}: corrupt: {key} is in the metadata twice")
            metadata[key] = reader.value(reader.scalar("I"))
        if metadata.get("split.count", 1) != 1:
            raise ValueError(f"{path}: is one of {metadata['split.count']} files of a split model; merge them first")
        table = [reader.tensor_entry() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"{path}: general.alignment must be a positive integer, found {alignment!r}")
        start = -(-file.tell() // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, ggml_type, offset in table:
        if name in tensors:
            raise ValueError(f"{path}: tensor {name} is in the table twice")
        info = TensorInfo(shape, ggml_type, start + offset, _row_bytes(shape, ggml_type, f"{path}: tensor {name}"))
        if info.offset + info.nbytes > reader.size:
            raise ValueError(
                f"{path}: truncated: tensor {name} ends at byte {info.offset + info.nbytes}, the file has {reader.size}"
            )
        tensors[name] = info
    return GGUFHeader(path, metadata, tensors)


def read_rows(header: GGUFHeader, name: str, start: int, stop: int) -> Tensor:
    """Rows start … stop of a tensor (elements, of a 1-D one), decoded: fp32, or fp16 and bf16 as they are stored."""
    info = header.tensors[name]
    if len(info.shape) == 1:
        return _decode(header, name, 0, 1).view(-1)[start:stop]
    return _decode(header, name, start, stop).view(stop - start, *info.shape[1:])


def _decode(header: GGUFHeader, name: str, start: int, stop: int) -> Tensor:
    info = header.tensors[name]
    rows_per_item = math.prod(info.shape[1:-1])  # a row here is one of the last dimension
    row_bytes = info.row_bytes * rows_per_item
    with open(header.path, "rb") as file:
        file.seek(info.offset + start * row_bytes)
        data = np.fromfile(file, dtype=np.uint8, count=(stop - start) * row_bytes)
    if data.size != (stop - start) * row_bytes:
        raise ValueError(f"{header.path}: truncated: tensor {name} cannot be read whole")
    if info.ggml_type in PLAIN:
        return torch.from_numpy(data).view(PLAIN[info.ggml_type])
    from gguf import GGMLQuantizationType, dequantize  # 0.2 s to import, and only block formats need it

    # one line of blocks: by rows, dequantize would loop over sixteen at a time
    return torch.from_numpy(dequantize(data[None], GGMLQuantizationType(info.ggml_type))[0])


def _row_bytes(shape: tuple[int, ...], ggml_type: int, where: str) -> int:
    """Bytes of one row. Raises ValueError for a type that cannot be decoded, or a row that is not whole blocks."""
    if ggml_type in PLAIN:
        return shape[-1] * PLAIN[ggml_type].itemsize
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if not _decodable(ggml_type):
        names = ", ".join(t.name for t in GGMLQuantizationType if int(t) in PLAIN or _decodable(int(t)))
        raise ValueError(f"{where} has ggml type {ggml_type}, which is not supported; supported: {names}")
    kind = GGMLQuantizationType(ggml_type)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise ValueError(f"{where} has rows of {shape[-1]}, which {kind.name} needs as a multiple of {block}")
    return shape[-1] // block * block_bytes


@lru_cache
def _decodable(ggml_type: int) -> bool:
    """Whether the gguf package knows the type and can decode a block of it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    try:
        kind = GGMLQuantizationType(ggml_type)
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except (ValueError, NotImplementedError):
        return False
    return True


class _Reader:
    """Reads the header's pieces, and never past the end of the file."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.size = path.stat().st_size

    def take(self, n: int) -> bytes:
        data = self.file.read(n) if n <= self.size else b""
        if len(data) != n:
            raise ValueError(f"{self.path}: truncated or corrupt: {n} bytes of the header are missing at its end")
        return data

    def scalar(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize(form)))[0]

    def count(self) -> int:
        """A u64 that counts things of at least a byte: more of them than the file has bytes is damage."""
        n = self.scalar("Q")
        if n > self.size:
            raise ValueError(f"{self.path}: corrupt: the header counts {n} entries in a file of {self.size} bytes")
        return n

    def string(self) -> str:
        data = self.take(self.count())
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{self.path}: corrupt: a string in the header is not utf-8: {data[:40]!r}") from None

    def name(self) -> str:
        """A string that errors may show: of a tensor, or a key."""
        text = self.string()
        if not text.isprintable() or len(text) > 200:
            raise ValueError(f"{self.path}: corrupt: a name in the header is {text[:40]!r}")
        return text

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            item, n = self.scalar("I"), self.count()
            if item == STRING:
                return [self.string() for _ in range(n)]
            if item in SCALARS:
                return list(struct.unpack(f"<{n}{SCALARS[item]}", self.take(n * struct.calcsize(SCALARS[item]))))
            raise ValueError(f"{self.path}: an array of GGUF value type {item} is not supported")
        if kind not in SCALARS:
            raise ValueError(f"{self.path}: corrupt: GGUF has no value type {kind}")
        return self.scalar(SCALARS[kind])

    def tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape in torch's order, ggml type, offset in the data)."""
        name, n_dims = self.name(), self.scalar("I")
        if not 1 <= n_dims <= 4:
            raise ValueError(f"{self.path}: corrupt: tensor {name} has {n_dims} dimensions")
        dims = [self.count() for _ in range(n_dims)]
        return name, tuple(reversed(dims)), self.scalar("I"), self.scalar("Q")
