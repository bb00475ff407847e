"""models/save.py: 4-bit folders to the bit, what it replaces, what it leaves when it fails, what it refuses. Reading
dense ones back: test_load.py; what transformers makes of both: tests/peers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora import LinearNF4, LoRAConfig, add_adapter, quantize_model
from models import load_model, save_model
from tests.small_llama import assert_same, small_decoder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model as save_model writes it."""
    save_model(small_decoder(), tmp_path / "model")
    return tmp_path / "model"


def four_bit_layers(model: nn.Module) -> dict[str, LinearNF4]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LinearNF4)}


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


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000], ids=["single", "sharded"])
@pytest.mark.parametrize(("quant_type", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_a_4_bit_model_comes_back_to_the_bit(
    quant_type: str, double_quant: bool, max_shard_bytes: int, tmp_path: Path
) -> None:
    """Rows that are no whole blocks, biases, a tied head; and once more from what was read."""
    save_model(small_decoder(tie_word_embeddings=True, attention_bias=True).bfloat16(), tmp_path / "dense")
    model = load_model(tmp_path / "dense", quantize=quant_type, double_quant=double_quant, blocksize=128)
    for name in ("first", "second"):
        save_model(model, tmp_path / name, max_shard_bytes=max_shard_bytes)
        again = load_model(tmp_path / name, quantize=quant_type if name == "second" else None)
        assert_same(again, model)
        for path, layer in four_bit_layers(model).items():
            q, found = layer.quantized, four_bit_layers(again)[path].quantized
            assert (found.shape, found.dtype, found.blocksize) == (q.shape, torch.bfloat16, 128)
            assert all(torch.equal(found.tensors()[key], tensor) for key, tensor in q.tensors().items())
        assert again.lm_head.weight is again.model.embed_tokens.weight
        model = again


def test_the_config_of_a_4_bit_folder_is_the_one_in_the_docs(tmp_path: Path) -> None:
    save_model(quantize_model(small_decoder().bfloat16()), tmp_path / "m")  # type: ignore[arg-type]
    written = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    page = (Path(__file__).parent.parent / "docs" / "formats.md").read_text(encoding="utf-8")
    shown = [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```", page, re.MULTILINE | re.DOTALL)]
    assert written in shown


def test_the_dtype_of_a_4_bit_folder_can_be_chosen(tmp_path: Path) -> None:
    """The codes stay; the dense part, and what the codes dequantize to, change."""
    model = quantize_model(small_decoder().bfloat16())
    save_model(model, tmp_path / "m")  # type: ignore[arg-type]
    wide = load_model(tmp_path / "m", dtype=torch.float32)
    assert {q.dtype for q in (layer.quantized for layer in four_bit_layers(wide).values())} == {torch.float32}
    assert wide.model.norm.weight.dtype == torch.float32
    for name, layer in four_bit_layers(model).items():
        assert torch.equal(four_bit_layers(wide)[name].packed, layer.packed)  # type: ignore[arg-type]


def test_the_dense_layers_of_a_4_bit_model_are_listed(tmp_path: Path) -> None:
    for skip, wanted, n_quantized in [
        (("lm_head",), None, 7),
        (("lm_head", "k_proj"), ["model.layers.0.self_attn.k_proj", "lm_head"], 6),
        ((), [], 8),
    ]:
        save_model(quantize_model(small_decoder(num_hidden_layers=1), skip=skip), tmp_path / "m")  # type: ignore[arg-type]
        raw = json.loads((tmp_path / "m" / "config.json").read_text())
        assert raw["quantization_config"]["llm_int8_skip_modules"] == wanted
        assert len(four_bit_layers(load_model(tmp_path / "m"))) == n_quantized


def test_what_cannot_be_saved(folder: Path, tmp_path: Path) -> None:
    mixed = small_decoder()
    mixed.lm_head = LinearNF4.from_weight(mixed.lm_head.weight, quant_type="fp4")  # type: ignore[assignment]
    for model, message in [
        (add_adapter(load_model(folder), LoRAConfig(r=2)), "wears one; save or merge the adapter"),
        (quantize_model(mixed, skip=()), "4-bit layers of one type, got fp4 and nf4"),
        (quantize_model(small_decoder(), quant_type="int4"), "bitsandbytes stores nf4 and fp4 weights, got 'int4'"),
    ]:
        with pytest.raises(ValueError, match=message):
            save_model(model, tmp_path / "x")  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()
