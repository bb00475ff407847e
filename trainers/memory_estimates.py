"""Estimates of what a step holds for a while: activations, a chunk of logits, the workspace of a backward, a KV cache.

Kept for backward, a token and layer, with s bytes an activation (elementwise.py, recompute.py, lora_matmul.py):

    inputs of both norms                 2·D·s + 8            their inputs and 1/rms, never what they return
    q, k, v after rope, and the output   (2·H + 2·Kv')·Dh·s   scaled_dot_product_attention keeps all four
    its log-sum-exp                      4·H
    gate and up                          2·I·s                their product is computed again
    x · Aᵀ of each adapter               n·r·s

and with gradient checkpointing D·s a layer, and one layer of the above.

    D hidden_size, H heads, Kv key-value heads, Dh head_dim, I intermediate_size, r rank, n target modules, V vocabulary
"""

from kernels.linear_cross_entropy import CHUNK_BYTES
from models import DecoderConfig

from .memory_setup import Setup


def a_layer(config: DecoderConfig, setup: Setup) -> int:
    """Bytes that one layer keeps for one token."""
    s, D, inner = setup.itemsize, config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads
    attention = 2 * (heads + heads) * config.head_dim * s + 4 * heads
    adapters = len(setup.targets) * setup.r * s if setup.method != "full" else 0
    return 2 * D * s + 8 + attention + 2 * inner * s + adapters


def activations(config: DecoderConfig, setup: Setup) -> int:
    """Bytes kept between forward and backward."""
    L, D = config.num_hidden_layers, config.hidden_size
    last = 2 * D * setup.itemsize  # the last norm's input and what it returns
    each = D * setup.itemsize if setup.gradient_checkpointing else a_layer(config, setup)
    return setup.tokens * (L * each + last)


def head_chunk(config: DecoderConfig, setup: Setup) -> int:
    return setup.predictions * 4 * config.hidden_size + min(CHUNK_BYTES, setup.predictions * 4 * config.vocab_size)


def last_backward(config: DecoderConfig, setup: Setup) -> int:
    s, D, inner = setup.itemsize, config.hidden_size, config.intermediate_size
    layer = a_layer(config, setup) if setup.gradient_checkpointing else 0
    return setup.tokens * (layer + 5 * inner * s + 2 * D * s)


def sampling(config: DecoderConfig, setup: Setup) -> tuple[int, int]:
    rows = setup.batch_size * setup.accumulation
    length = setup.sequence_length
    cache = rows * length * 2 * config.num_key_value_heads * config.head_dim * setup.itemsize * config.num_hidden_layers
    return cache, rows * config.vocab_size * 8


