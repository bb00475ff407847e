"""Fingerprints of the files that a run reads beside its rows: base model and chat template, to notice other ones.

    model_sha256           sha256 over the name, the size and the bytes of every file that load_model and load_tokenizer
                           read; of a file over 64 MiB: its first MiB, where the header of safetensors and GGUF is, and
                           1024 pieces of 4 KiB, as evenly spread as can be
    teacher_sha256         the same of a distillation's teacher; teacher_adapter_sha256 of the adapter that it wears
    chat_template_sha256   of the file that --chat-template names; not there where it names a format

Reading 14 GB to the last byte takes longer than loading it. Weights that were trained further differ nearly everywhere,
so the pieces tell; a few weights changed by hand in a large file may go unnoticed.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.source import MODEL_FILES, locate

MODELS = ("model", "teacher")
"""Flags that name a model."""
ADAPTER = "teacher_adapter"
"""The flag that names an adapter's folder."""
WHOLE = 64 * 2**20
HEADER, PIECE, PIECES = 2**20, 4096, 1024


def fingerprints(config: Mapping[str, Any]) -> dict[str, str]:
    """By name, of the files that these flags name. Raises ValueError where there is no such model, OSError."""
    found = {f"{flag}_sha256": model_sha256(config[flag]) for flag in MODELS if config.get(flag) is not None}
    adapter = config.get(ADAPTER)
    if adapter is not None and Path(adapter).is_dir():
        found[f"{ADAPTER}_sha256"] = model_sha256(adapter)
    template = config.get("chat_template")
    if template is not None and Path(template).is_file():
        found["chat_template_sha256"] = hashlib.sha256(Path(template).read_bytes()).hexdigest()
    return found


def model_sha256(source: str | Path) -> str:
    """Of a model's files, wherever they lie: source as load_model takes it."""
    path = locate(source)
    files = {file for pattern in MODEL_FILES for file in path.glob(pattern)} if path.is_dir() else {path}
    digest = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name if path.is_dir() else ''}\0{size}\0".encode())
        with open(file, "rb") as opened:
            if size <= WHOLE:
                digest.update(opened.read())
                continue
            digest.update(opened.read(HEADER))
            for piece in range(PIECES):
                opened.seek((size - PIECE) * piece // (PIECES - 1), os.SEEK_SET)
                digest.update(opened.read(PIECE))
    return digest.hexdigest()
