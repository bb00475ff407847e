"""GGUF files of every family: names, row order, settings, and what of them a family does not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

import models.load
from models import load_model
from tests.small_llama import FAMILIES, MISTRAL, QWEN2, QWEN3, assert_same, small_decoder, write_gguf

STORED: dict[str, dict[str, Any]] = {
    "mistral without a window": {"attention__sliding_window": 0},
    "mistral": {"attention__sliding_window": 5},
    "qwen2": {},
    "qwen3": {},
    "smollm3": {},
}
"""Settings of FAMILIES that a GGUF file can say, and the metadata that says them."""


@pytest.mark.parametrize("setting", STORED)
@pytest.mark.usefixtures("row_chunks")
def test_a_file_of_each_family_comes_back_to_the_bit(setting: str, tmp_path: Path) -> None:
    model = small_decoder(**FAMILIES[setting])
    write_gguf(model, tmp_path / "m.gguf", **STORED[setting])
    loaded = load_model(tmp_path / "m.gguf")
    assert_same(loaded, model)
    ids = torch.randint(0, 96, (2, 20))
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))
    if setting != "mistral without a window":  # which is a Llama there: the file does not tell them apart
        assert loaded.config.architecture == model.config.architecture
    for name in ("windows", "rope_layers", "qkv_bias", "qk_norm", "head_dim", "rope"):
        assert getattr(loaded.config, name) == getattr(model.config, name), name


@pytest.mark.parametrize("family", [MISTRAL, QWEN2, QWEN3], ids=["mistral", "qwen2", "qwen3"])
def test_block_formats_and_4_bits(family: dict[str, Any], tmp_path: Path) -> None:
    """Rows of q and k are put in order after they are decoded; quantizing sees the same."""
    model = small_decoder(**family, hidden_size=64, head_dim=32, intermediate_size=96)
    write_gguf(model, tmp_path / "m.gguf", {"proj.weight": Kind.Q8_0})
    loaded = load_model(tmp_path / "m.gguf")
    for name, parameter in model.named_parameters():
        error = (loaded.get_parameter(name) - parameter).abs().max()
        assert error <= parameter.abs().max() / 127 if "proj.weight" in name else error == 0, name
    quantized = load_model(tmp_path / "m.gguf", quantize="nf4")
    wanted = models.load.kernels.quantize(loaded.model.layers[0].self_attn.q_proj.weight.detach())
    assert torch.equal(quantized.model.layers[0].self_attn.q_proj.packed, wanted.packed)


def test_yarn_in_a_file(tmp_path: Path) -> None:
    model = small_decoder(**QWEN2, **{key: FAMILIES["yarn rope"][key] for key in ("rope", "head_dim")})
    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 16}
    write_gguf(model, tmp_path / "m.gguf", **{f"rope__scaling__{key}": value for key, value in scaling.items()})
    loaded = load_model(tmp_path / "m.gguf")
    assert loaded.config.rope == model.config.rope
    assert_same(loaded, model)


def test_tensors_that_another_family_has_are_refused(tmp_path: Path) -> None:
    """A Qwen2 under Llama's name has biases but none on o; a Qwen3 has norms that no Llama has."""
    for changes, message in [
        (QWEN2, r"tensor model\.layers\.0\.self_attn\.o_proj\.bias is missing"),
        (QWEN3, r"tensor blk\.0\.attn_k_norm\.weight does not belong to a LlamaForCausalLM"),
    ]:
        write_gguf(small_decoder(**changes), tmp_path / "m.gguf")
        content = (tmp_path / "m.gguf").read_bytes()
        name = b"qwen2" if changes is QWEN2 else b"qwen3"
        (tmp_path / "m.gguf").write_bytes(content.replace(name, b"llama"))
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path / "m.gguf")
