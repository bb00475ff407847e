"""Small random decoders for tests: one for each setting and family, and a Llama's weights as a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import Decoder, DecoderConfig
from models.config import RopeConfig

TOLERANCE = 2e-4
"""of the logits' largest magnitude: float32's noise over a whole model, in another order of sums"""
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # large, so that attention is far from uniform
}
LLAMA3 = RopeConfig("llama3", 500.0, 8.0, 1.0, 4.0, 32)
SETTINGS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "one key-value head a head": {"num_key_value_heads": 6},
    "one key-value head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim of its own": {"head_dim": 20},
    "narrow head_dim": {"head_dim": 6},
    "linear rope": {"rope": RopeConfig("linear", 1000.0, 4.0)},
    "llama3 rope": {"rope": LLAMA3, "head_dim": 16},
    "other theta and epsilon": {"rope": RopeConfig(theta=100.0), "rms_norm_eps": 1e-3},
}
"""Llama's settings; FAMILIES has the others'."""
YARN = RopeConfig("yarn", 500.0, 4.0, original_max_position_embeddings=16)
MISTRAL: dict[str, Any] = {"architecture": "MistralForCausalLM"}
QWEN2: dict[str, Any] = {"architecture": "Qwen2ForCausalLM", "qkv_bias": True}
QWEN3: dict[str, Any] = {"architecture": "Qwen3ForCausalLM", "qk_norm": True}
SMOLLM3: dict[str, Any] = {"architecture": "SmolLM3ForCausalLM"}
FAMILIES: dict[str, dict[str, Any]] = {
    "yarn rope": {"rope": YARN, "head_dim": 16},
    "yarn rope, all settings": {
        "rope": RopeConfig("yarn", 300.0, 2.5, 1.0, 4.0, 20, 5.0, 0.5, False, 1.3),
        "head_dim": 20,
    },
    "mistral": {**MISTRAL, "windows": (5, 5), "head_dim": 6},
    "mistral without a window": {**MISTRAL, "head_dim": 10, "tie_word_embeddings": True},
    "mistral, a window of one": {**MISTRAL, "windows": (1, 1), "num_key_value_heads": 6},
    "qwen2": {**QWEN2, "tie_word_embeddings": True},
    "qwen2, last layers windowed": {**QWEN2, "num_hidden_layers": 3, "windows": (None, 7, 7), "head_dim": 10},
    "qwen2, other layers windowed": {**QWEN2, "num_hidden_layers": 3, "windows": (4, None, 4), "rope": YARN},
    "qwen3": {**QWEN3, "head_dim": 10, "rms_norm_eps": 1e-3},
    "qwen3, biases and a window": {**QWEN3, "attention_bias": True, "windows": (3, None), "tie_word_embeddings": True},
    "smollm3": {
        **SMOLLM3,
        "num_hidden_layers": 4,
        "rope_layers": (True, True, True, False),
        "tie_word_embeddings": True,
    },
    "smollm3, windows and biases": {
        **SMOLLM3,
        "num_hidden_layers": 3,
        "rope_layers": (False, True, True),
        "windows": (6, None, 6),
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 6,
        "rope": LLAMA3,
    },
}
EVERY = SETTINGS | FAMILIES


def small_config(**changes: Any) -> DecoderConfig:
    return DecoderConfig(**(SIZES | changes))


def small_decoder(**changes: Any) -> Decoder:
    """Random weights, norms and biases too, in eval mode."""
    model = Decoder(small_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.5 + torch.rand_like(parameter))
    return model.eval()


GGUF_FAMILIES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MistralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
    "SmolLM3ForCausalLM": gguf.MODEL_ARCH.SMOLLM3,
}


def gguf_writer(config: DecoderConfig, path: Path, **metadata: Any) -> gguf.GGUFWriter:
    """A writer with the model's settings. metadata: settings to change or add, `.` written as `__`."""
    family = gguf.MODEL_ARCH_NAMES[GGUF_FAMILIES[config.architecture]]
    writer = gguf.GGUFWriter(path, family)
    settings = {
        "vocab_size": config.vocab_size,
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope.theta,
    }
    settings |= {key.replace("__", "."): value for key, value in metadata.items()}
    for key, value in settings.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{family}.{key}", value)
    return writer


def gguf_names(model: Decoder) -> dict[str, str]:
    """What llama.cpp calls each parameter."""
    family = GGUF_FAMILIES[model.config.architecture]
    names = gguf.get_tensor_name_map(family, model.config.num_hidden_layers)
    return {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name, _ in model.named_parameters()}


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(
    model: Decoder, path: Path, kinds: dict[str, gguf.GGMLQuantizationType] | None = None, **metadata: Any
) -> None:
    """The model in llama.cpp's names and row order, each 2-D tensor in the kind of its name's ending, F32 by default.

    metadata: settings to change or add, `.` written as `__`.
    """
    config = model.config
    writer = gguf_writer(config, path, **metadata)
    names = gguf_names(model)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if config.architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        heads = {}  # their rows keep Hugging Face's order
    for name, tensor in model.named_parameters():
        values = permuted(tensor.detach(), heads[name.split(".")[-2]]) if name.split(".")[-2] in heads else tensor
        kind = next((k for end, k in (kinds or {}).items() if name.endswith(end)), gguf.GGMLQuantizationType.F32)
        array = values.detach().float().numpy()
        writer.add_tensor(
            names[name], gguf.quantize(array, kind) if tensor.ndim == 2 else array, raw_dtype=kind_of(kind, tensor)
        )
    if config.rope.rope_type == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))
    finish(writer)


def kind_of(kind: gguf.GGMLQuantizationType, tensor: Tensor) -> gguf.GGMLQuantizationType:
    return kind if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32


def permuted(tensor: Tensor, heads: int) -> Tensor:
    """llama.cpp's order: in each head, row j + s·Dh/2 goes to row 2j + s."""
    rows = tensor.shape[0] // heads
    moved = torch.empty_like(tensor)
    for head in range(heads):
        for j in range(rows // 2):
            for s in range(2):
                moved[head * rows + 2 * j + s] = tensor[head * rows + j + s * rows // 2]
    return moved


def llama3_factors(config: DecoderConfig) -> np.ndarray:
    """As llama.cpp's converter writes them, frequency by frequency."""
    rope, factors = config.rope, []
    for i in range(0, config.head_dim, 2):
        wavelength = 2 * np.pi * rope.theta ** (i / config.head_dim)
        low = rope.original_max_position_embeddings / rope.low_freq_factor
        high = rope.original_max_position_embeddings / rope.high_freq_factor
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(rope.factor)
        else:
            smooth = (rope.original_max_position_embeddings / wavelength - rope.low_freq_factor) / (
                rope.high_freq_factor - rope.low_freq_factor
            )
            factors.append(1 / ((1 - smooth) / rope.factor + smooth))
    return np.array(factors, dtype=np.float32)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Logits within TOLERANCE of their scale."""
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= TOLERANCE, f"logits differ by {error:.2e} of their scale"


def assert_same(ours: Decoder, wanted: Decoder) -> None:
    named = dict(ours.named_parameters())
    assert named.keys() == dict(wanted.named_parameters()).keys()
    for name, parameter in wanted.named_parameters():
        assert torch.equal(named[name], parameter), name


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
