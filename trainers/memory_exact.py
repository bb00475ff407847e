"""The bytes that a run holds from beginning to end, from a model's config alone: these are counts, not estimates.

    dense weight       N·K · bytes of its dtype
    4-bit weight       ⌈n/2⌉ + 4·⌈n/B⌉                          n = N·K, blocks of B, one fp32 scale each
      double-quantized ⌈n/2⌉ + ⌈n/B⌉ + 4·⌈⌈n/B⌉/256⌉ + 4        scales in 8 bits, their scales and mean in fp32
    adapter            4 · r·(K + N)                            fp32, as all that is trained
    gradients          4 · trained
    AdamW              8 · trained, or 2 + 8/256 of each in 8 bits (optim/state_8bit.py)

QLoRA, arXiv 2305.14314, §3. Only the linear layers inside the decoder's layers become 4-bit: embeddings, head, norms
and biases stay dense, which is most of a small model.

    N out_features, K in_features, r rank
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from models import DecoderConfig
from optim.layout import Item, lay_out
from optim.paged_adamw import EVERYTHING, PAGE_BYTES
from optim.pages import AHEAD
from optim.state_8bit import state_fields
from quant.double_quant import BLOCKSIZE2

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def layer_linears(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """(N, K) of every linear layer in one layer of the decoder."""
    D, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention = {"q_proj": (q, D), "k_proj": (kv, D), "v_proj": (kv, D), "o_proj": (D, q)}
    return attention | {"gate_proj": (inner, D), "up_proj": (inner, D), "down_proj": (D, inner)}


def biases(config: DecoderConfig) -> int:
    """Elements of the biases of one layer."""
    sizes = {name: N for name, (N, _) in layer_linears(config).items()}
    with_bias: tuple[str, ...] = ("q_proj", "k_proj", "v_proj") if config.qkv_bias else ()
    with_bias = ATTENTION if config.attention_bias else with_bias
    mlp = tuple(name for name in ALL_LINEAR if name not in ATTENTION) if config.mlp_bias else ()
    return sum(sizes[name] for name in (*with_bias, *mlp))


def norms(config: DecoderConfig) -> int:
    """Elements of all RMSNorms."""
    of_a_layer = 2 * config.hidden_size + (2 * config.head_dim if config.qk_norm else 0)
    return config.num_hidden_layers * of_a_layer + config.hidden_size


@dataclass(frozen=True)
class Counts:
    """Parameters by what becomes of them."""

    linear: int
    """in the linear layers of the decoder's layers: what 4 bits are for"""
    embedding: int
    """embeddings, and a head of its own"""
    rest: int
    """norms and biases"""

    @property
    def total(self) -> int:
        return self.linear + self.embedding + self.rest


def count(config: DecoderConfig) -> Counts:
    linear = config.num_hidden_layers * sum(N * K for N, K in layer_linears(config).values())
    tables = 1 if config.tie_word_embeddings else 2
    rest = norms(config) + config.num_hidden_layers * biases(config)
    return Counts(linear, tables * config.vocab_size * config.hidden_size, rest)


@dataclass(frozen=True)
class FourBits:
    """Bytes of the 4-bit layers."""

    codes: int
    scales: int


def four_bits(config: DecoderConfig, blocksize: int, double_quant: bool) -> FourBits:
    codes = scales = 0
    for N, K in layer_linears(config).values():
        n_blocks = math.ceil(N * K / blocksize)
        codes += math.ceil(N * K / 2)
        scales += n_blocks + 4 * math.ceil(n_blocks / BLOCKSIZE2) + 4 if double_quant else 4 * n_blocks
    return FourBits(config.num_hidden_layers * codes, config.num_hidden_layers * scales)


def adapter_tensors(config: DecoderConfig, r: int, targets: Sequence[str] = ALL_LINEAR) -> list[int]:
    """Elements of every lora_A and lora_B. Raises ValueError for a target that no layer has."""
    shapes = layer_linears(config)
    if unknown := [name for name in targets if name not in shapes]:
        raise ValueError(f"target_modules must be of {', '.join(shapes)}, got {unknown[0]!r}")
    return [size for name in targets for size in (r * shapes[name][1], r * shapes[name][0])] * config.num_hidden_layers


def dense_tensors(config: DecoderConfig) -> list[int]:
    """Elements of every parameter of the dense model, a tied head once."""
    return list(_dense_tensors(config))


def _dense_tensors(config: DecoderConfig) -> Iterator[int]:
    yield from [config.vocab_size * config.hidden_size] * (1 if config.tie_word_embeddings else 2)
    shapes = layer_linears(config)
    qkv = ("q_proj", "k_proj", "v_proj")
    for _ in range(config.num_hidden_layers):
        for name, (N, K) in shapes.items():
            yield N * K
            attention = config.attention_bias or (config.qkv_bias and name in qkv)
            if attention if name in ATTENTION else config.mlp_bias:
                yield N
        yield from [config.hidden_size] * 2
        yield from [config.head_dim] * (2 if config.qk_norm else 0)
    yield config.hidden_size


class State(NamedTuple):
    """Bytes of the optimizer's state."""

    fast: int
    spilled: int
    """on the host, or in a folder"""


def optimizer_state(tensors: Sequence[int], optimizer: str, budget: int | None = None) -> State:
    """Of fp32 parameters of these many elements: laid out in pages as PagedAdamW does it."""
    if optimizer == "adamw":
        return State(sum(8 * n + 4 for n in tensors), 0)  # and a step count for each
    bits = 8 if optimizer == "paged_adamw_8bit" else 32
    items = [Item(n, state_fields(torch.empty(n, device="meta"), bits)) for n in tensors]
    whole = sum(page.used for page in lay_out(items, EVERYTHING))
    if budget is None:
        return State(whole, 0)
    pages = lay_out(items, PAGE_BYTES)
    if budget >= len(pages) * PAGE_BYTES:
        return State(whole, 0)
    frames = min(len(pages), max(1 + min(AHEAD, 1), budget // PAGE_BYTES))  # as optim/pages.py has it
    return State(frames * PAGE_BYTES, max(0, sum(page.used for page in pages) - frames * PAGE_BYTES))
