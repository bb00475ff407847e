"""models/save.py: what it replaces, what it leaves when it fails, what it refuses. Reading back: test_load.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora import LoRAConfig, add_adapter
from models import load_model, save_model
from tests.small_llama import assert_same, small_decoder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model as save_model writes it."""
    save_model(small_decoder(), tmp_path / "model")
    return tmp_path / "model"


def test_saving_replaces_a_model_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    other = small_decoder(num_hidden_layers=1)
    save_model(other, folder)
    assert_same(load_model(folder), other)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    for target in (tmp_path / "notes", tmp_path / "notes" / "mine.txt"):
        with pytest.raises(ValueError, match="is there already and is no model folder"):
            save_model(other, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "notes"]


def test_a_save_that_fails_leaves_the_old_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "model.safetensors").read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("models.save.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(small_decoder(), folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_only_dense_models_are_saved(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is in 4 bits; load it without quantize, or merge"):
        save_model(load_model(folder, quantize="nf4"), tmp_path / "x")
    with pytest.raises(ValueError, match="wears an adapter; save or merge the adapter"):
        save_model(add_adapter(load_model(folder), LoRAConfig(r=2)), tmp_path / "x")  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()
