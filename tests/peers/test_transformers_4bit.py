"""4-bit folders between models/ and transformers + bitsandbytes, really run: what they write is read here to the bit,
what is written here loads there without a warning, and both give the logits of one another within float32's noise.

bitsandbytes' CPU kernel reads the right scales only where no block crosses the end of a row: every K here is a multiple
of the block size. Noise: the same model twice in float32, with its sums in another order; the bound is 2e-4 of the
logits' scale, as for dense models (test_transformers.py).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lora import LinearNF4
from models import Decoder, DecoderConfig, load_model, save_model
from quant import to_bnb_state_dict
from tests.small_llama import small_config, small_decoder

TOLERANCE = 2e-4
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32}
KINDS = [(quant_type, double_quant) for quant_type in ("nf4", "fp4") for double_quant in (True, False)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What transformers and bitsandbytes log at warning level or above."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("transformers", "bitsandbytes", "accelerate")]
    for logger in loggers:
        logger.addHandler(handler)
    yield messages
    for logger in loggers:
        logger.removeHandler(handler)


def config_of(**changes: Any) -> DecoderConfig:
    return small_config(**(SIZES | {"initializer_range": 0.1} | changes))


def write_theirs(folder: Path, config: DecoderConfig, dtype: torch.dtype, shard: str = "1GB", **options: Any) -> None:
    """A random model that transformers quantizes while loading, and saves."""
    LlamaForCausalLM(LlamaConfig(**config.to_hf())).to(dtype).save_pretrained(folder / "dense")
    options = {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype} | options
    quantized = AutoModelForCausalLM.from_pretrained(
        folder / "dense", quantization_config=BitsAndBytesConfig(**options), dtype=dtype
    )
    quantized.save_pretrained(folder / "theirs", max_shard_size=shard)


@torch.no_grad()
def assert_equal_logits(ours: Decoder, folder: Path) -> None:
    """In float32. They keep a 4-bit folder's dense part in the dtype it has, and multiply in the compute dtype that
    its config names, so both are changed here. In training mode: in eval mode bitsandbytes may repack its weights.
    """
    theirs = AutoModelForCausalLM.from_pretrained(folder).train()
    for parameter in theirs.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in theirs.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = torch.float32
    ids = torch.randint(0, 96, (2, 23))
    expected = theirs(ids).logits
    error = (ours(ids) - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE, f"logits differ by {error:.2e} of their scale"


def four_bit_layers(model: Decoder) -> dict[str, LinearNF4]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LinearNF4)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("quant_type", "double_quant"), KINDS)
def test_a_folder_that_they_quantized_and_saved(
    quant_type: str, double_quant: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Every tensor to the bit in the dtype of the file, and their logits in float32."""
    config = config_of(tie_word_embeddings=double_quant, attention_bias=True)
    options = {"bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": double_quant}
    write_theirs(tmp_path, config, dtype, **options)
    ours = load_model(tmp_path / "theirs")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=dtype)
    stored = theirs.state_dict()
    assert ours.config == config
    assert len(four_bit_layers(ours)) == 7 * config.num_hidden_layers
    for name, layer in four_bit_layers(ours).items():
        q = layer.quantized
        assert (q.quant_type, q.double_quant, q.dtype) == (quant_type, double_quant, dtype)
        for key, tensor in to_bnb_state_dict(q, f"{name}.weight").items():
            assert torch.equal(tensor.view(-1), stored[key].view(-1)), key
    for name, parameter in ours.named_parameters():
        if name in stored:
            assert torch.equal(parameter, stored[name]), name
    assert_equal_logits(load_model(tmp_path / "theirs", dtype=torch.float32), tmp_path / "theirs")


@pytest.mark.parametrize(
    "options",
    [
        {"shard": "60KB"},
        {"llm_int8_skip_modules": ["model.layers.1.mlp.up_proj", "lm_head"]},
        {"llm_int8_skip_modules": ["k_proj"]},
    ],
    ids=["sharded", "one layer dense", "the head in 4 bits"],
)
def test_their_other_settings(options: dict[str, Any], tmp_path: Path) -> None:
    write_theirs(tmp_path, config_of(), torch.float32, bnb_4bit_quant_type="nf4", **options)
    ours = load_model(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file() == ("shard" in options)
    assert isinstance(ours.lm_head, LinearNF4) == (options.get("llm_int8_skip_modules") == ["k_proj"])
    assert_equal_logits(ours, tmp_path / "theirs")
    save_model(ours, tmp_path / "again")
    assert_equal_logits(load_model(tmp_path / "again"), tmp_path / "again")


@pytest.mark.parametrize(
    ("quant_type", "double_quant", "blocksize", "dtype"),
    [
        (*kind, blocksize, DTYPES[(i + j) % 3])
        for i, blocksize in enumerate((32, 64, 128))
        for j, kind in enumerate(KINDS)
    ],
)
def test_a_folder_that_we_wrote(
    quant_type: str, double_quant: bool, blocksize: int, dtype: torch.dtype, tmp_path: Path, said: list[str]
) -> None:
    """Accepted without a word, and equal in float32; their settings then say what ours were."""
    model = small_decoder(**SIZES, tie_word_embeddings=double_quant, attention_bias=True, initializer_range=0.1)
    save_model(model.to(dtype), tmp_path / "dense")
    options: dict[str, Any] = {"quantize": quant_type, "double_quant": double_quant, "blocksize": blocksize}
    quantized = load_model(tmp_path / "dense", **options)
    save_model(quantized, tmp_path / "ours", max_shard_bytes=60_000 if blocksize == 32 else 10**9)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert said == []
    assert theirs.dtype == dtype
    settings = theirs.config.quantization_config
    assert settings.bnb_4bit_quant_type == quant_type
    assert settings.bnb_4bit_use_double_quant == double_quant
    assert settings.bnb_4bit_compute_dtype == dtype
    state = theirs.model.layers[0].mlp.up_proj.weight.quant_state
    assert (state.blocksize, state.quant_type, state.nested) == (blocksize, quant_type, double_quant)
    assert_equal_logits(load_model(tmp_path / "ours", dtype=torch.float32), tmp_path / "ours")


def test_bytes_that_they_store_under_another_dtype(tmp_path: Path) -> None:
    """The same codes as in uint8 (bitsandbytes' CPU kernel refuses to multiply by them, so there are no logits)."""
    layers = []
    for storage in (torch.uint8, torch.bfloat16):
        torch.manual_seed(0)
        folder = tmp_path / str(storage)
        write_theirs(folder, config_of(), torch.float32, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=storage)
        layers.append(four_bit_layers(load_model(folder / "theirs")))
    for name, layer in layers[0].items():
        for key, tensor in layer.quantized.tensors().items():
            assert torch.equal(tensor, layers[1][name].quantized.tensors()[key]), (name, key)


def test_the_config_that_we_write_is_theirs(tmp_path: Path) -> None:
    """Field for field, as they spell it for a model that they quantized themselves."""
    write_theirs(tmp_path, config_of(), torch.bfloat16, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    save_model(load_model(tmp_path / "theirs"), tmp_path / "ours")
    raws = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours")]
    assert raws[0]["quantization_config"] == raws[1]["quantization_config"]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("MistralForCausalLM", {"windows": (5, 5)}),
        ("Qwen2ForCausalLM", {"qkv_bias": True}),
        ("Qwen3ForCausalLM", {"qk_norm": True}),
        ("SmolLM3ForCausalLM", {"num_hidden_layers": 4, "rope_layers": (True, True, True, False)}),
    ],
)
def test_the_other_families(family: str, changes: dict[str, Any], tmp_path: Path, said: list[str]) -> None:
    model = small_decoder(**SIZES, architecture=family, initializer_range=0.1, **changes)
    save_model(model, tmp_path / "dense")
    save_model(load_model(tmp_path / "dense", quantize="nf4"), tmp_path / "ours")
    assert_equal_logits(load_model(tmp_path / "ours"), tmp_path / "ours")
    assert said == []
