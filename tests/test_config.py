"""models/config.py: both spellings of rope, defaults, the way back, and every refusal, each in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models import DecoderConfig
from models.config import RopeConfig, read_config
from tests.small_llama import EVERY, small_config

MINIMAL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_what_is_left_out_has_llamas_defaults() -> None:
    config = DecoderConfig.from_hf(MINIMAL)
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)
    assert (config.max_position_embeddings, config.rms_norm_eps, config.rope) == (2048, 1e-6, RopeConfig())
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (False, False, False)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (None, (), None)


@pytest.mark.parametrize(
    ("older", "newer", "rope"),
    [
        ({}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, RopeConfig()),
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, RopeConfig(theta=5e5)),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            RopeConfig("linear", 1e4, 2.0),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3},
            {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
            RopeConfig("llama3", 5e5, 8.0, 1.0, 4.0, 8192),
        ),
    ],
    ids=["nothing", "theta", "linear", "llama3"],
)
def test_both_spellings_of_rope(older: dict[str, Any], newer: dict[str, Any], rope: RopeConfig) -> None:
    assert DecoderConfig.from_hf(MINIMAL | older).rope == rope
    assert DecoderConfig.from_hf(MINIMAL | newer).rope == rope


@pytest.mark.parametrize("setting", EVERY)
def test_what_is_written_is_read_back(setting: str, tmp_path: Path) -> None:
    config = small_config(bos_token_id=0, eos_token_ids=(2,), **EVERY[setting])
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert read_config(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["MixtralForCausalLM"]},
            "architecture MixtralForCausalLM is not supported; supported: Llama",
        ),
        ({"architectures": None, "model_type": "gpt2"}, "model_type 'gpt2' without architectures is not supported"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 4}},
            'rope type "dynamic" is not supported; supported: default, linear, llama3, yarn',
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor must be a positive number, got nothing"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4}}, r"low_freq_factor \(4.0\) must be below high_freq_factor"),
        ({"rope_scaling": "linear"}, 'rope_parameters must be an object, got "linear"'),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1, got 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be null or 1, got 0.5"),
        ({"hidden_act": "gelu"}, 'hidden_act must be "silu", got "gelu"'),
        ({"sliding_window": 4096}, "sliding_window must be null, got 4096"),
        ({"num_local_experts": 8}, "num_local_experts must be null or 0, got 8"),
        ({"attention_dropout": 0.1}, "attention_dropout must be null or 0, got 0.1"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config must be null"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "got also sliding_attention"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, got 0"),
        ({"hidden_size": "32"}, 'hidden_size must be a positive integer, got "32"'),
        ({"vocab_size": None}, "vocab_size must be a positive integer, got null"),
        ({"num_attention_heads": True}, "num_attention_heads must be a positive integer, got true"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps must be a positive number, got -1e-06"),
        ({"rope_theta": "big"}, 'rope_theta must be a positive number, got "big"'),
        ({"tie_word_embeddings": "yes"}, 'tie_word_embeddings must be true or false, got "yes"'),
        ({"eos_token_id": [2, "3"]}, r'eos_token_id must be an integer or null, got "3"'),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)"),
        ({"head_dim": 5}, "head_dim must be even, since rope turns pairs; got 5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        DecoderConfig.from_hf(MINIMAL | changes, "here/config.json")
    assert str(caught.value).startswith("here/config.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        ("\xff", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_file_that_is_no_json_object(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as caught:
        read_config(path)
    assert str(path) in str(caught.value)
