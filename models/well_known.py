"""Shapes of well-known models, as their config.json has them: enough to count bytes without a download.

Parameter counts follow from these and are checked in the tests against the published ones. Names are lower case.
Left out: rope, token ids and what else no byte depends on.
"""

from typing import Any

from .config import DecoderConfig

QWEN: dict[str, Any] = {"architecture": "Qwen2ForCausalLM", "qkv_bias": True}
TIED: dict[str, Any] = {"tie_word_embeddings": True}


def _shape(
    vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, dim: int, context: int, **rest: Any
) -> DecoderConfig:
    return DecoderConfig(vocab, hidden, inner, layers, heads, kv_heads, dim, context, **rest)


WELL_KNOWN: dict[str, DecoderConfig] = {
    "smollm2-135m": _shape(49152, 576, 1536, 30, 9, 3, 64, 8192, **TIED),
    "smollm2-360m": _shape(49152, 960, 2560, 32, 15, 5, 64, 8192, **TIED),
    "qwen2.5-0.5b": _shape(151936, 896, 4864, 24, 14, 2, 64, 32768, **QWEN, **TIED),
    "llama-3.2-1b": _shape(128256, 2048, 8192, 16, 32, 8, 64, 131072, **TIED),
    "qwen2.5-1.5b": _shape(151936, 1536, 8960, 28, 12, 2, 128, 32768, **QWEN, **TIED),
    "smollm2-1.7b": _shape(49152, 2048, 8192, 24, 32, 32, 64, 8192, **TIED),
    "qwen2.5-3b": _shape(151936, 2048, 11008, 36, 16, 2, 128, 32768, **QWEN, **TIED),
    "llama-3.2-3b": _shape(128256, 3072, 8192, 28, 24, 8, 128, 131072, **TIED),
    "llama-2-7b": _shape(32000, 4096, 11008, 32, 32, 32, 128, 4096),
    "mistral-7b": _shape(32000, 4096, 14336, 32, 32, 8, 128, 32768, architecture="MistralForCausalLM"),
    "qwen2.5-7b": _shape(152064, 3584, 18944, 28, 28, 4, 128, 32768, **QWEN),
    "llama-3.1-8b": _shape(128256, 4096, 14336, 32, 32, 8, 128, 131072),
    "llama-2-13b": _shape(32000, 5120, 13824, 40, 40, 40, 128, 4096),
    "qwen2.5-14b": _shape(152064, 5120, 13824, 48, 40, 8, 128, 32768, **QWEN),
    "qwen2.5-32b": _shape(152064, 5120, 27648, 64, 40, 8, 128, 32768, **QWEN),
    "llama-2-70b": _shape(32000, 8192, 28672, 80, 64, 8, 128, 4096),
    "llama-3.1-70b": _shape(128256, 8192, 28672, 80, 64, 8, 128, 131072),
    "qwen2.5-72b": _shape(152064, 8192, 29568, 80, 64, 8, 128, 32768, **QWEN),
}
"""From the smallest to the largest."""

HUB = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B-Instruct",
    "llama-2-7b": "meta-llama/Llama-2-7b-chat-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-chat-hf",
    "llama-2-70b": "meta-llama/Llama-2-70b-chat-hf",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.2",
    **{f"qwen2.5-{size}b": f"Qwen/Qwen2.5-{size}B-Instruct" for size in ("0.5", "1.5", "3", "7", "14", "32", "72")},
}
"""Where the instruction-tuned model of this shape is on the hub."""
