"""A GGUF file as a checkpoint: llama.cpp's names, settings and row order turned into Hugging Face's.

    token_embd → model.embed_tokens          blk.{i}.attn_q → model.layers.{i}.self_attn.q_proj          and so on
    output     → lm_head; without it, the head is tied to the embeddings

In rope, Hugging Face turns the pairs (j, j + Dh/2) of a head. llama.cpp does so too for Qwen, but for Llama and
SmolLM3 it turns neighbours (2j, 2j+1): its converter reorders the rows of their q and k within each head, and reading
undoes that. A Mistral is a `llama` there. `rope_freqs.weight` holds what each frequency is divided by; the setting
behind it is not stored, so Llama 3's own (low 1, high 4, 8192 positions) is tried and must fit.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .attention import llama3_factors
from .config import DecoderConfig
from .gguf_format import PLAIN, GGUFHeader, read_header, read_rows

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
SCALING = ("type", "factor", "original_context_length", "finetuned")  # what rope.scaling may have
REORDERED = ("llama", "smollm3")  # the rows of q and k


class GGUFCheckpoint:
    """The tensors of a .gguf file under Hugging Face's names. Raises ValueError for another family's."""

    def __init__(self, path: Path) -> None:
        self.header = read_header(path)
        self.config = _config(self.header)
        self.reordered = self.header.metadata["general.architecture"] in REORDERED
        self.stored_as = {_hf_name(name): name for name in self.header.tensors if name != ROPE_FACTORS}
        self.shapes = {name: self.header.tensors[stored].shape for name, stored in self.stored_as.items()}
        self.dtype = _dtype(self.header)
        self.quant_type: str | None = None  # its block formats are decoded: none of them is nf4 or fp4

    def where(self, name: str) -> str:
        return f"{self.header.path}: tensor {self.stored_as.get(name, name)}"

    def is_quantized(self, name: str) -> bool:
        return False

    def read_quantized(self, name: str) -> None:
        return None

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start … stop (elements, of a bias or norm)."""
        stored = self.stored_as[name]
        if not (self.reordered and re.search(r"\.attn_[qk]\.", stored)):
            return read_rows(self.header, stored, start, stop)
        Dh = self.config.head_dim
        first, last = start // Dh * Dh, -(-stop // Dh) * Dh  # whole heads
        rows = read_rows(self.header, stored, first, last)
        in_order = rows.view(-1, Dh // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
        return in_order[start - first : stop - first]


def _hf_name(name: str) -> str:
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(\w+)", name)
    if block and block[2] in NAMES:
        return f"model.layers.{block[1]}.{NAMES[block[2]]}.{block[3]}"
    stem, _, leaf = name.rpartition(".")
    return f"{NAMES[stem]}.{leaf}" if stem in NAMES else name


def _dtype(header: GGUFHeader) -> torch.dtype:
    """What the weights are when they are plain numbers, fp32 when any is a block format (norms are always fp32)."""
    types = {info.ggml_type for info in header.tensors.values()}
    if not types <= set(PLAIN):
        return torch.float32
    return PLAIN[max(types)]  # bf16, else fp16, else fp32


def _config(header: GGUFHeader) -> DecoderConfig:
    """The settings in the metadata. Raises ValueError for another architecture or a setting that is not supported."""
    data, where = header.metadata, str(header.path)
    family = data.get("general.architecture")
    if not isinstance(family, str) or family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"{where}: architecture {family!r} is not supported; supported in GGUF: {known}")
    if "token_embd.weight" not in header.tensors:
        raise ValueError(f"{where}: tensor token_embd.weight is missing")

    def of(key: str, default: Any = None) -> Any:
        value = data.get(f"{family}.{key}", default)
        if isinstance(value, float):
            with np.errstate(over="ignore"):
                return float(str(np.float32(value)))  # stored in 32 bits: 1e-05, not 9.999999747378752e-06
        return value

    heads, layers = of("attention.head_count"), of("block_count")
    if isinstance(layers, int) and layers > len(header.tensors):
        raise ValueError(f"{where}: {family}.block_count is {layers}, and the file has {len(header.tensors)} tensors")
    raw = {
        "architectures": [FAMILIES[family]],
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": of("attention.head_count_kv", heads),
        "head_dim": of("attention.key_length"),
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": of("attention.layer_norm_rms_epsilon"),
        "rope_theta": of("rope.freq_base"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
        "num_local_experts": of("expert_count"),
        "sliding_window": of("attention.sliding_window") or None,
        "bos_token_id": data.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": data.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": data.get("tokenizer.ggml.padding_token_id"),
    }
    kind = of("rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f'{where}: rope type "{kind}" is not supported; supported in GGUF: none, linear, yarn')
    if kind != "none":
        raw["rope_scaling"] = {"rope_type": kind, "factor": of("rope.scaling.factor")}
    unknown = [key for key in data if key.startswith(f"{family}.rope.scaling.") and key.split(".", 3)[3] not in SCALING]
    if unknown and kind != "none":
        raise ValueError(f"{where}: {unknown[0]} is not supported; supported beside it: {', '.join(SCALING)}")
    if kind == "yarn":
        raw["rope_scaling"]["original_max_position_embeddings"] = of("rope.scaling.original_context_length")
    if family == "llama" and raw["sliding_window"] is not None:
        raw["architectures"] = ["MistralForCausalLM"]
    config = DecoderConfig.from_hf(raw, where)
    for key in ("rope.dimension_count", "attention.value_length"):
        if of(key, config.head_dim) != config.head_dim:
            raise ValueError(f"{where}: {family}.{key} must be the head size, {config.head_dim}, got {of(key)}")
    return _with_rope_factors(config, raw, header) if ROPE_FACTORS in header.tensors else config


def _with_rope_factors(config: DecoderConfig, raw: dict[str, Any], header: GGUFHeader) -> DecoderConfig:
    """The config whose llama3 scaling gives the stored factors. Raises ValueError when Llama 3's settings do not."""
    unknown = ValueError(
        f"{header.path}: tensor {ROPE_FACTORS} does not come from Llama 3's rope scaling "
        "(low_freq_factor 1, high_freq_factor 4, 8192 positions); no other is supported in GGUF"
    )
    if header.tensors[ROPE_FACTORS].shape != (config.head_dim // 2,):
        raise unknown
    stored = read_rows(header, ROPE_FACTORS, 0, config.head_dim // 2).float()
    if not torch.isfinite(stored).all() or stored.max() <= 0:
        raise unknown
    scaling = {
        "rope_type": "llama3",
        "factor": float(stored.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled = DecoderConfig.from_hf(raw | {"rope_scaling": scaling}, str(header.path))
    if not torch.allclose(stored, llama3_factors(scaled), rtol=1e-5):
        raise unknown
    return scaled if scaling["factor"] != 1.0 else config
