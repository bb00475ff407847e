"""4-bit folders that are damaged or foreign: one clear line that names the file and the tensor. Folders that are whole:
test_save.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import load_model, save_model
from quant import quantize, to_bnb_state_dict
from tests.small_llama import change_tensors, small_decoder
from tests.test_load_errors import change_config

WEIGHT = "model.layers.1.mlp.up_proj.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small dense model."""
    save_model(small_decoder(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def folder_4bit(folder: Path, tmp_path: Path) -> Path:
    """The same model in bitsandbytes' 4 bits."""
    save_model(load_model(folder, quantize="nf4"), tmp_path / "model4")
    return tmp_path / "model4"


def state_of(**changes: Any) -> Callable[[dict[str, Tensor]], Any]:
    def change(tensors: dict[str, Tensor]) -> None:
        text = json.dumps(json.loads(bytes(tensors[STATE].tolist())) | changes)
        tensors[STATE] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change


def as_fp4(tensors: dict[str, Tensor]) -> None:
    tensors |= {  # of one weight alone
        **{key: tensors.pop(key) for key in list(tensors) if not key.startswith(WEIGHT)},
        **to_bnb_state_dict(quantize(torch.ones(80, 48), quant_type="fp4"), WEIGHT),
    }
    del tensors[STATE]


DAMAGE_4BIT: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no state": (lambda t: t.pop(STATE), r"a 4-bit weight needs exactly one of .*quant_state.*, found 0$"),
    "no codes": (
        lambda t: t.pop(WEIGHT),
        r"needs the tensor model\.layers\.1\.mlp\.up_proj\.weight, which is missing$",
    ),
    "no scales": (lambda t: t.pop(f"{WEIGHT}.absmax"), r"up_proj\.weight\.absmax, which is missing$"),
    "codes cut short": (
        lambda t: t.update({WEIGHT: t[WEIGHT][:-1].clone()}),
        r"must hold 1920 torch.uint8 values, got 1919",
    ),
    "NaN scales": (lambda t: t[f"{WEIGHT}.nested_absmax"].fill_(float("nan")), r"absmax holds NaN or infinity$"),
    "infinite scales": (lambda t: t[f"{WEIGHT}.nested_absmax"].fill_(float("inf")), r"absmax holds NaN or infinity$"),
    "another shape": (state_of(shape=[48, 80]), r"has shape \(48, 80\), the config needs \(80, 48\)$"),
    "huge shape": (state_of(shape=[2**62, 2**62]), r"has shape .* the config needs \(80, 48\)$"),
    "shape of text": (state_of(shape="80x48"), r"shape must be a list of positive whole numbers, got '80x48'$"),
    "state of a million bytes": (
        lambda t: t.update({STATE: torch.full((2_000_000,), 32, dtype=torch.uint8)}),
        r"must hold at most 1048576 bytes of JSON, got 2000000$",
    ),
    "two types": (as_fp4, "holds both nf4 and fp4 weights"),
    "bytes for a norm": (
        lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.uint8)}),
        r"tensor model\.norm\.weight has dtype U8, which is not supported",
    ),
    "4-bit embeddings": (
        lambda t: t.update(to_bnb_state_dict(quantize(torch.ones(96, 48)), "model.embed_tokens.weight")),
        r"embed_tokens\.weight is in 4 bits, which only linear layers can be",
    ),
    "4-bit norm": (
        lambda t: t.update(to_bnb_state_dict(quantize(torch.ones(48)), "model.norm.weight")),
        r"tensor model\.norm\.weight is in 4 bits, which only linear layers can be",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE_4BIT)
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_damaged_4_bit_folder_is_one_clear_line(damage: str, quantize: str | None, folder_4bit: Path) -> None:
    harm, message = DAMAGE_4BIT[damage]
    change_tensors(folder_4bit, harm)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(folder_4bit, quantize=quantize)
    assert str(folder_4bit) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            "quantization 'gptq' is not supported; supported: bitsandbytes with load_in",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            "quantization bitsandbytes without load_in_4bit is not",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": "yes"},
            "quantization bitsandbytes without load_in_4bit is not",
        ),
        ({"quant_method": ["fp8"]}, r"quantization \['fp8'\] is not supported"),
        ([4], "quantization_config must be an object, got list"),
    ],
    ids=str,
)
def test_other_quantizations_are_refused_by_name(config: Any, message: str, folder_4bit: Path) -> None:
    change_config(folder_4bit, quantization_config=config)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(folder_4bit)
    assert "config.json" in str(caught.value)


def test_a_4_bit_folder_in_another_type_or_without_4_bit_weights(folder: Path, folder_4bit: Path) -> None:
    with pytest.raises(ValueError, match=r"is in nf4 already, and cannot be loaded in fp4$"):
        load_model(folder_4bit, quantize="fp4")
    raw = json.loads((folder_4bit / "config.json").read_text())
    change_config(folder, quantization_config=raw["quantization_config"])
    with pytest.raises(ValueError, match=r"config\.json announces 4-bit weights, and the files hold none$"):
        load_model(folder)


def test_4_bit_scales_that_the_dtype_cannot_hold(folder_4bit: Path) -> None:
    change_tensors(folder_4bit, lambda t: t[f"{WEIGHT}.nested_absmax"].fill_(1e6))
    load_model(folder_4bit)
    with pytest.raises(ValueError, match=r"up_proj\.weight has scales that float16 cannot hold$"):
        load_model(folder_4bit, dtype=torch.float16)


def test_a_head_in_4_bits_cannot_be_tied(tmp_path: Path) -> None:
    save_model(small_decoder(tie_word_embeddings=True), tmp_path / "m")
    head = to_bnb_state_dict(quantize(torch.ones(96, 48)), "lm_head.weight")
    change_tensors(tmp_path / "m", lambda t: t.update(head))
    with pytest.raises(
        ValueError, match=r"lm_head\.weight is in 4 bits, which a head tied to its embeddings cannot be$"
    ):
        load_model(tmp_path / "m")
