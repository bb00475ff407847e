"""Small random models of every family, with every setting, in models/ and in transformers, really run: logits,
gradients, cached decoding, generation, saved folders, and configs in the spellings of transformers 4 and 5.

Windows are far shorter than the texts. Weights are large (std 0.3), so that attention is far from uniform.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from models import Decoder, DecoderConfig, KVCache, generate, load_model, save_model
from models.config import read_config
from models.families import FAMILIES
from tests.small_llama import EVERY, TOLERANCE, assert_close, small_config, small_decoder

Pair = tuple[Decoder, PreTrainedModel]
DOCUMENTS = (9, 2, 15, 7)


def theirs_of(config: DecoderConfig) -> PreTrainedModel:
    """A random transformers model of this config, norms and biases random too."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.to_hf())).eval()
    assert type(model).__name__ == config.architecture
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.5 + torch.rand_like(parameter) if "norm" in name else torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=EVERY)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """One model in both libraries, through a folder that transformers wrote."""
    torch.manual_seed(1)
    theirs = theirs_of(small_config(**EVERY[request.param]))
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return load_model(folder), theirs


@torch.no_grad()
def test_logits_of_single_prompts(pair: Pair) -> None:
    ours, theirs = pair
    for T in (1, 2, 37, 64):
        ids = torch.randint(0, 96, (1, T))
        assert_close(ours(ids), theirs(ids).logits)


@torch.no_grad()
def test_logits_of_a_padded_batch(pair: Pair) -> None:
    ours, theirs = pair
    ids = torch.randint(0, 96, (3, 21))
    real = torch.arange(21) < torch.tensor([21, 5, 13])[:, None]
    assert_close(ours(ids, segment_ids=real.long())[real], theirs(ids, attention_mask=real.long()).logits[real])


@torch.no_grad()
def test_logits_of_left_padding_and_given_positions(pair: Pair) -> None:
    ours, theirs = pair
    ids = torch.randint(0, 96, (2, 17))
    real = torch.arange(17) >= torch.tensor([6, 0])[:, None]
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=real.long(), position_ids=positions).logits
    assert_close(ours(ids, segment_ids=real.long())[real], expected[real])
    later = torch.arange(30, 47)[None]
    assert_close(ours(ids, position_ids=later), theirs(ids, position_ids=later).logits)


@torch.no_grad()
def test_logits_of_packed_documents(pair: Pair) -> None:
    """Each document in a row of several gets the logits that it gets alone; so it is in their own packing."""
    ours, theirs = pair
    documents = [torch.randint(0, 96, (1, n)) for n in DOCUMENTS]
    row = torch.cat(documents, dim=1)
    segments = torch.tensor([[number for number, n in enumerate(DOCUMENTS, start=1) for _ in range(n)]])
    wanted = torch.cat([theirs(document).logits for document in documents], dim=1)
    assert_close(ours(row, segment_ids=segments), wanted)
    positions = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]
    assert_close(ours(row, segment_ids=segments), theirs(row, position_ids=positions, use_cache=False).logits)


@torch.no_grad()
def test_logits_of_cached_decoding(pair: Pair) -> None:
    """Rows of 4 and 9 tokens, then one token at a time, several at once, one again: the logits of a full forward."""
    ours, theirs = pair
    lengths = [4, 9]
    rows = [torch.randint(0, 96, (1, length + 20)) for length in lengths]
    expected = [theirs(row).logits[0] for row in rows]
    cache = KVCache(ours.config, 2, 29)
    prompts = torch.stack(
        [torch.nn.functional.pad(row[0, :n], (0, 9 - n)) for row, n in zip(rows, lengths, strict=True)]
    )
    real = torch.arange(9) < torch.tensor(lengths)[:, None]
    logits = ours(prompts, segment_ids=real.long(), cache=cache)
    assert_close(logits[real], torch.cat([e[:n] for e, n in zip(expected, lengths, strict=True)]))
    for step, new in [(0, 1), (1, 1), (2, 1), (3, 3), (6, 1), (7, 10), (17, 1), (18, 2)]:
        ids = torch.cat([row[:, n + step : n + step + new] for row, n in zip(rows, lengths, strict=True)])
        wanted = torch.stack([e[n + step : n + step + new] for e, n in zip(expected, lengths, strict=True)])
        assert_close(ours(ids, cache=cache), wanted)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_gradients(checkpointing: bool, pair: Pair) -> None:
    ours, theirs = pair
    ids = torch.randint(0, 96, (2, 23))
    weight = torch.randn(2, 23, 96)
    ours.gradient_checkpointing = checkpointing
    gradients = []
    for logits, model in ((ours(ids), ours), (theirs(ids).logits, theirs)):
        model.zero_grad()
        (logits * weight).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    ours.gradient_checkpointing = False
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        scale = gradients[1][name].norm()
        if name.endswith("k_proj.bias") and not ours.config.has_rope(int(name.split(".")[2])):
            scale = gradients[1][name.replace("bias", "weight")].norm()  # its own is 0: softmax ignores q · bias
        if re.search("[qk]_proj", name) and ours.config.window(int(name.split(".")[2])) == 1:
            scale = gradients[1][re.sub("[qk]_proj", "v_proj", name)].norm()  # theirs is 0: one key has all the weight
        error = (gradient - gradients[1][name]).norm() / scale
        assert error <= TOLERANCE, f"gradient of {name} differs by {error:.2e}"


def test_greedy_generation(pair: Pair) -> None:
    """Past every window. Their cache of a window of one keeps everything (it slices from -0): there they do without."""
    ours, theirs = pair
    prompt = torch.randint(0, 96, (1, 7))
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "use_cache": 1 not in ours.config.windows}
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, **options)
    assert generate(ours, prompt.tolist(), max_new_tokens=24)[0].ids == expected[0, 7:].tolist()


@torch.no_grad()
@pytest.mark.parametrize("setting", EVERY)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000], ids=["single", "sharded"])
def test_a_saved_folder_loads_there(setting: str, max_shard_bytes: int, tmp_path: Path) -> None:
    ours = small_decoder(**EVERY[setting])
    save_model(ours, tmp_path / "m", max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "m" / "model.safetensors.index.json").is_file() == (max_shard_bytes == 20_000)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(0, 96, (2, 30))
    assert_close(ours(ids), theirs.eval()(ids).logits)
    for name, parameter in load_model(tmp_path / "m").named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name)), name


def test_a_bf16_folder_keeps_its_dtype_in_both(tmp_path: Path) -> None:
    ours = small_decoder().bfloat16()
    save_model(ours, tmp_path / "m")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").dtype == torch.bfloat16
    assert load_model(tmp_path / "m").compute_dtype == torch.bfloat16


@torch.no_grad()
def test_bf16_is_as_near_to_fp32_as_theirs(tmp_path: Path) -> None:
    ours = small_decoder()
    ids = torch.randint(0, 96, (2, 30))
    save_model(ours, tmp_path / "m")
    exact = ours(ids)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)(ids).logits.float()
    low = load_model(tmp_path / "m", dtype=torch.bfloat16)(ids)
    assert (low - exact).norm() <= 2 * (theirs - exact).norm()


@pytest.mark.parametrize("setting", EVERY)
def test_configs_read_and_write_alike(setting: str, tmp_path: Path) -> None:
    config = small_config(bos_token_id=1, eos_token_ids=(2, 3), pad_token_id=4, **EVERY[setting])
    written = AutoConfig.for_model(**config.to_hf())
    written.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in raw
    assert read_config(tmp_path / "config.json") == config
    assert DecoderConfig.from_hf(config.to_hf()) == config


MINIMAL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
}
SIZES = {**MINIMAL, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "use_cache": True}
AS_WRITTEN_BY_4: dict[str, dict[str, Any]] = {
    "Llama 2": {"rope_scaling": None, "pretraining_tp": 1, "max_position_embeddings": 4096},
    "Llama 3.2": {
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "eos_token_id": [128001, 128008, 128009],
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "Mistral 0.1": {"model_type": "mistral", "sliding_window": 4096, "rope_theta": 10000.0},
    "Mistral 0.3": {"model_type": "mistral", "sliding_window": None, "rope_theta": 1000000.0},
    "Qwen2.5": {
        "model_type": "qwen2",
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "max_window_layers": 28,
        "use_sliding_window": False,
    },
    "Qwen2.5 with YaRN": {
        "model_type": "qwen2",
        "rope_theta": 1000000.0,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        "use_sliding_window": True,
    },
    "Qwen3": {
        "model_type": "qwen3",
        "head_dim": 128,
        "attention_bias": False,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "max_window_layers": 28,
        "use_sliding_window": False,
    },
    "SmolLM3": {
        "model_type": "smollm3",
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "no_rope_layer_interval": 4,
        "layer_types": ["full_attention"] * 36,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "SmolLM3 with windows": {"model_type": "smollm3", "sliding_window": 512, "use_sliding_window": True},
    "YaRN by mscale": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 40,
            "mscale": 0.8,
            "mscale_all_dim": 1.2,
            "beta_fast": 16,
            "original_max_position_embeddings": 512,
        }
    },
}


def as_they_read_it(raw: dict[str, Any]) -> DecoderConfig:
    """Read by transformers 5, written by it in full, read here. Token ids are ours: it invents them for some."""
    theirs = AutoConfig.for_model(**raw).to_dict()
    assert "rope_theta" not in theirs
    ids = {name: raw.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return DecoderConfig.from_hf(theirs | ids)


@pytest.mark.parametrize("name", AS_WRITTEN_BY_4)
def test_configs_of_transformers_4_mean_what_5_reads(name: str) -> None:
    raw = {"model_type": "llama", **SIZES, **AS_WRITTEN_BY_4[name]}
    config = DecoderConfig.from_hf(raw)
    assert config == as_they_read_it(raw)
    assert config == DecoderConfig.from_hf(config.to_hf())


@pytest.mark.parametrize("architecture", FAMILIES)
def test_what_a_config_lacks_means_what_it_means_there(architecture: str) -> None:
    raw = {"model_type": FAMILIES[architecture].model_type, **MINIMAL}
    assert DecoderConfig.from_hf(raw) == as_they_read_it(raw)
    if FAMILIES[architecture].windows == "some layers":
        raw |= {"use_sliding_window": True, "sliding_window": 77}
        config = DecoderConfig.from_hf(raw)
        assert 77 in config.windows
        assert config == as_they_read_it(raw)
