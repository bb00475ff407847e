"""models/config.py, families.py, rope_config.py, fields.py: both spellings of rope, what each family's settings mean,
defaults, the way back, and every refusal, each in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from models import DecoderConfig
from models.config import RopeConfig, read_config
from models.rope_config import yarn_scale
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
MISTRAL: dict[str, Any] = {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 4}
QWEN2: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 4}
SMOLLM3: dict[str, Any] = {"architectures": ["SmolLM3ForCausalLM"], "num_key_value_heads": 4}
WINDOW: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 9}
FULL, SLIDING = "full_attention", "sliding_attention"


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
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4}, "max_position_embeddings": 512},
            {
                "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4, "attention_factor": None},
                "max_position_embeddings": 512,
            },
            RopeConfig("yarn", 1e6, 4.0, original_max_position_embeddings=512),
        ),
    ],
    ids=["nothing", "theta", "linear", "llama3", "yarn"],
)
def test_both_spellings_of_rope(older: dict[str, Any], newer: dict[str, Any], rope: RopeConfig) -> None:
    assert DecoderConfig.from_hf(MINIMAL | older).rope == rope
    assert DecoderConfig.from_hf(MINIMAL | newer).rope == rope


def test_yarns_attention_factor() -> None:
    """The paper's 0.1 · ln(factor) + 1; a quotient of two of them; or a number of its own."""
    scaling = {"rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 64}

    def scale(**changes: float) -> float:
        return yarn_scale(DecoderConfig.from_hf(MINIMAL | {"rope_scaling": scaling | changes}).rope)

    assert scale() == pytest.approx(0.1 * math.log(8) + 1)
    assert scale(mscale=0.7, mscale_all_dim=1.4) == pytest.approx((0.07 * math.log(8) + 1) / (0.14 * math.log(8) + 1))
    assert scale(mscale=0.7) == pytest.approx(0.1 * math.log(8) + 1)
    assert scale(attention_factor=1.5) == 1.5
    assert scale(factor=0.5) == 1.0


def layers_of(architecture: str, **changes: Any) -> tuple[list[int | None], list[bool]]:
    raw = MINIMAL | {"architectures": [architecture], "num_hidden_layers": 4, "num_key_value_heads": 4} | changes
    config = DecoderConfig.from_hf(raw)
    assert DecoderConfig.from_hf(config.to_hf()) == config
    return [config.window(i) for i in range(4)], [config.has_rope(i) for i in range(4)]


@pytest.mark.parametrize(
    ("architecture", "settings", "windows", "rope"),
    [
        ("Llama", {}, [None] * 4, [True] * 4),
        ("Mistral", {}, [4096] * 4, [True] * 4),
        ("Mistral", {"sliding_window": None}, [None] * 4, [True] * 4),
        ("Mistral", {"sliding_window": 9, "layer_types": [SLIDING] * 4}, [9] * 4, [True] * 4),
        ("Qwen2", {"sliding_window": 9, "max_window_layers": 2}, [None] * 4, [True] * 4),
        ("Qwen2", WINDOW, [None] * 4, [True] * 4),
        ("Qwen2", WINDOW | {"max_window_layers": 2}, [None, None, 9, 9], [True] * 4),
        ("Qwen3", WINDOW | {"max_window_layers": 0}, [9] * 4, [True] * 4),
        ("Qwen3", WINDOW | {"layer_types": [SLIDING, FULL, SLIDING, FULL]}, [9, None, 9, None], [True] * 4),
        ("SmolLM3", {}, [None] * 4, [True, True, True, False]),
        ("SmolLM3", {"no_rope_layer_interval": 2}, [None] * 4, [True, False, True, False]),
        ("SmolLM3", WINDOW | {"no_rope_layers": [0, 1, 1, 1]}, [9, None, None, None], [False, True, True, True]),
        ("SmolLM3", WINDOW | {"layer_types": [SLIDING] + [FULL] * 3}, [9, None, None, None], [True, True, True, False]),
    ],
)
def test_windows_and_rope_by_layer(
    architecture: str, settings: dict[str, Any], windows: list[int | None], rope: list[bool]
) -> None:
    assert layers_of(f"{architecture}ForCausalLM", **settings) == (windows, rope)


def test_biases_and_norms_by_family() -> None:
    """(attention_bias, mlp_bias, qkv_bias, qk_norm) where the config says true, and where it says nothing."""
    both = {"attention_bias": True, "mlp_bias": True}
    wanted = {
        "Llama": (both, (True, True, False, False)),
        "Mistral": ({}, (False, False, False, False)),
        "Qwen2": ({}, (False, False, True, False)),
        "Qwen3": ({"attention_bias": True}, (True, False, False, True)),
        "SmolLM3": (both, (True, True, False, False)),
    }
    for name, (settings, found) in wanted.items():
        raw = MINIMAL | {"architectures": [f"{name}ForCausalLM"], "num_key_value_heads": 4} | settings
        config = DecoderConfig.from_hf(raw)
        assert (config.attention_bias, config.mlp_bias, config.qkv_bias, config.qk_norm) == found


def test_an_architecture_is_known_by_its_model_type() -> None:
    raw = MINIMAL | {"architectures": None, "model_type": "qwen3", "num_key_value_heads": 4}
    assert DecoderConfig.from_hf(raw).architecture == "Qwen3ForCausalLM"


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
        ({"rope_scaling": {"rope_type": ["yarn"]}}, r'rope type \["yarn"\] is not supported'),
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
        ({"rope_scaling": {"type": "su", "short_factor": [1.0]}}, 'rope type "su" is not supported'),
        ({"rope_scaling": {"rope_type": "longrope"}}, 'rope type "longrope" is not supported'),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, 'holds "full_attention", not supported'),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, 'holds "mrope_section", not supported'),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta_fast": 1}},
            r"beta_slow \(1.0\) must be below beta_fast",
        ),
        ({"rope_theta": 1, "rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope_theta must not be 1 with yarn"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping must be null, got 50.0; supported: Llama"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping must be null, got 30.0"),
        ({"logit_scale": 0.5}, "logit_scale must be null or 1, got 0.5"),
        ({"architectures": ["GemmaForCausalLM"]}, "supported: Llama.*, Mistral.*, Qwen2.*, Qwen3.*, SmolLM3"),
        (MISTRAL | {"attention_bias": True}, "attention_bias must be null or false, got true"),
        (MISTRAL | {"sliding_window": 0}, "sliding_window must be a positive integer, got 0"),
        (
            MISTRAL | {"layer_types": [FULL, SLIDING]},
            "must all be sliding_attention, got also full_attention",
        ),
        (MISTRAL | {"num_local_experts": 8}, "num_local_experts must be null or 0, got 8"),
        (QWEN2 | {"mlp_bias": True}, "mlp_bias must be null or false, got true"),
        (
            QWEN2 | {"layer_types": [FULL]},
            "must be a list with one entry for each of the 2 layers, got a list of 1",
        ),
        (QWEN2 | {"layer_types": ["chunked_attention", FULL]}, 'layer_types holds "chunked_attention", which is not'),
        (QWEN2 | {"layer_types": [SLIDING, FULL]}, "holds sliding_attention, but there is no window: it takes"),
        (QWEN2 | WINDOW | {"max_window_layers": -1}, "max_window_layers must be an integer from 0, got -1"),
        (QWEN2 | WINDOW | {"sliding_window": "big"}, 'sliding_window must be a positive integer, got "big"'),
        (QWEN2 | {"use_sliding_window": 1}, "use_sliding_window must be true or false, got 1"),
        (SMOLLM3 | {"no_rope_layers": [1, 2]}, "no_rope_layers holds 2, which is not supported; supported: 0, 1"),
        (SMOLLM3 | {"no_rope_layers": "all"}, "no_rope_layers must be a list with one entry for each of the 2 layers"),
        (SMOLLM3 | {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval must be a positive"),
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
