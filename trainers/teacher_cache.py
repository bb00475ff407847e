"""A teacher's predictions in files: computed once, with the teacher out of memory while the student trains.

    CACHE/
      train.json                 what it was made from and how: examples, vocabulary, teacher, top k, temperature
      train-00000.safetensors    ids int32 (n, k), logps fp32 (n, k)     n learnt tokens of the first 64 examples
      train-00001.safetensors    of the next 64, and so on
      eval.json, eval-…          the same for held-out rows, always at temperature 1

A row is what the teacher predicts for one learnt token: its k likeliest tokens, likeliest first, and log softmax(z / τ)
over the whole vocabulary of each. 64 tokens take 512 bytes, all 49,152 of SmolLM2 would take 197 kB.

A file is written aside and renamed, so one that has its name is whole: stopped at any moment, writing goes on with the
first file that is missing, to the same bytes. A cache of other examples, vocabulary or weights is refused.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.batch import Batch, collate
from data.encode import Encoded
from kernels import Head, TopK, linear_top_k

from .loop import split as cut
from .run_folder import write_json
from .teacher import LoadedTeacher, Split

PER_FILE = 64
"""Examples in a file."""
MEANING = {
    "examples": "the dataset, its chat format, --learn or --max-seq-length differ",
    "vocabulary": "the student's tokenizer differs",
    "teacher_sha256": "the teacher's files differ",
    "teacher_adapter_sha256": "the teacher's adapter differs",
}


def description_of(examples: Sequence[Encoded], vocabulary: dict[str, int], **how: Any) -> dict[str, Any]:
    """What a cache of these examples must say of itself."""
    content = [[example.ids, example.completion_mask] for example in examples]
    tokens = sum(example.n_learnt for example in examples)
    return {"examples": _sha256(content), "vocabulary": _sha256(vocabulary), "learnt_tokens": tokens, **how}


class TopKCache:
    """One split of a cache, complete or to be completed."""

    def __init__(self, folder: Path, split: Split, examples: Sequence[Encoded], description: dict[str, Any]) -> None:
        """Raises ValueError, naming the field, where the folder holds a cache of something else."""
        self.folder, self.split, self.examples, self.description = folder, split, examples, description
        starts = list(accumulate((example.n_learnt for example in examples), initial=0))
        self._rows = [(starts[i] - starts[i - i % PER_FILE], examples[i].n_learnt) for i in range(len(examples))]
        self.path = folder / f"{split}.json"
        if self.path.exists():
            _check_same(self.path, description)

    def missing(self) -> list[int]:
        """Numbers of the files that are not there yet."""
        return [number for number in range(-(-len(self.examples) // PER_FILE)) if not self._file(number).exists()]

    def complete(self, teacher: LoadedTeacher, batch_size: int, pad_id: int, say: Callable[[str], None]) -> None:
        """Write the files that are missing. Raises ValueError for a top k larger than the vocabulary."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.description)
        missing = self.missing()
        for done, number in enumerate(missing):
            if done % max(1, len(missing) // 10) == 0:
                first, last = number * PER_FILE, len(self.examples)
                say(f"teacher: predictions of {self.split} example {first:,} of {last:,} on into {self.folder}")
            self._write(number, teacher, batch_size, pad_id)

    def read(self, numbers: Sequence[int]) -> TopK:
        """The predictions for the learnt tokens of these examples, one after the other."""
        parts = [self._read(number) for number in numbers]
        return TopK(torch.cat([ids for ids, _ in parts]), torch.cat([logps for _, logps in parts]))

    def rest(self) -> float:
        """The mean probability outside of the top k, over the learnt tokens of the first example."""
        return float(1 - self.read([0]).logps.exp().sum(dim=1).mean())

    def _write(self, number: int, teacher: LoadedTeacher, batch_size: int, pad_id: int) -> None:
        k, temperature = self.description["top_k"], self.description["temperature"]
        parts = []
        for examples in cut(self.examples[number * PER_FILE : (number + 1) * PER_FILE], batch_size):
            hidden, head = teacher.predictions(self.split, collate(examples, pad_id=pad_id), ())
            assert isinstance(hidden, Tensor)
            assert head is not None
            parts.append(linear_top_k(hidden, head, k, temperature=temperature))
        tensors = {name: torch.cat([getattr(part, name) for part in parts]).cpu() for name in TopK._fields}
        path = self._file(number)
        temporary = path.with_name(path.name + ".tmp")
        safetensors.torch.save_file(tensors, temporary)
        os.replace(temporary, path)

    def _read(self, number: int) -> tuple[Tensor, Tensor]:
        path, (start, n) = self._file(number // PER_FILE), self._rows[number]
        try:
            with safe_open(path, framework="pt") as file:
                ids, logps = (file.get_slice(name)[start : start + n] for name in TopK._fields)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        if ids.shape != (n, self.description["top_k"]) or logps.shape != ids.shape:
            raise ValueError(f"{path} must hold {n} rows for example {number + 1}, found ids of {tuple(ids.shape)}")
        return ids, logps

    def _file(self, number: int) -> Path:
        return self.folder / f"{self.split}-{number:05d}.safetensors"


class CachedTeacher:
    """A teacher of complete caches."""

    def __init__(self, caches: dict[Split, TopKCache]) -> None:
        self.caches = caches

    def predictions(self, split: Split, batch: Batch, numbers: Sequence[int]) -> tuple[Tensor | TopK, Head | None]:
        """(TopK of the learnt tokens, None)."""
        return self.caches[split].read(numbers), None


def _check_same(path: Path, wanted: dict[str, Any]) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        was = {name: found.get(name) for name in wanted}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    for name, value in json.loads(json.dumps(wanted)).items():
        if was[name] != value:
            what = MEANING.get(name, f"{name} was {was[name]!r}, now it is {value!r}")
            raise ValueError(f"{path.parent} is a cache of something else: {what}; pass another --teacher-cache")


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
