"""The same arithmetic for other frameworks, to hold it against figures that they have published (docs/memory.md).

    activations a token and layer, bf16    12·D + 4·Kv·Dh + 8·I bytes      with flash attention, as autograd keeps them
    logits                                 10·V bytes a token / chunks    bf16, fp32, and the gradient in fp32
    eager mode                             times 1.45: copies by rope, fp32 norms, dequantized weights

The three are those of a Llama layer written in plain modules; 1.45 is one number for every row of LitGPT's, fixed by
its Llama-2-7B nf4-dq figure. What is trained is held in bf16 there: 2 bytes, 2 of gradient, and 4 of AdamW's moments.
"""

from dataclasses import dataclass

from models import DecoderConfig

from .memory_exact import ALL_LINEAR, adapter_tensors, count, four_bits


@dataclass(frozen=True)
class Framework:
    """What differs."""

    activation_factor: float = 1.0
    logit_chunks: int = 1


TORCHTUNE = Framework(1.0, 8)
"""compiled, with its chunked cross-entropy"""
LITGPT = Framework(1.45, 1)
"""eager, bf16-true, no checkpointing"""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Settings of a published figure."""

    method: str
    tokens: int
    """of a batch; 0: inference, weights alone"""
    double_quant: bool = True
    gradient_checkpointing: bool = False
    optimizer_in_backward: bool = False
    """each gradient is used and freed at once: the largest alone is held"""
    state_bytes: int = 4
    """of AdamW for each trained parameter"""
    r: int = 8
    targets: tuple[str, ...] = ALL_LINEAR


def total(config: DecoderConfig, framework: Framework, run: Run) -> int:
    """Bytes at the peak."""
    return _weights(config, run) + _trained(config, run) + _activations(config, framework, run)


def _weights(config: DecoderConfig, run: Run) -> int:
    counts = count(config)
    if run.method != "qlora":
        return 2 * counts.total
    found = four_bits(config, 64, run.double_quant)
    return found.codes + found.scales + 2 * (counts.embedding + counts.rest)


def _trained(config: DecoderConfig, run: Run) -> int:
    if not run.tokens:
        return 0
    if run.method != "full":
        return (2 + 2 + run.state_bytes) * sum(adapter_tensors(config, run.r, run.targets))
    n = count(config).total
    largest = config.vocab_size * config.hidden_size
    return run.state_bytes * n + 2 * (largest if run.optimizer_in_backward else n)


def _activations(config: DecoderConfig, framework: Framework, run: Run) -> int:
    D, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    a_layer = framework.activation_factor * (12 * D + 4 * kv + 8 * config.intermediate_size)
    kept = config.num_hidden_layers * (2 * D if run.gradient_checkpointing else a_layer)
    live = a_layer if run.gradient_checkpointing else 0
    return round(run.tokens * (kept + live + 10 * config.vocab_size / framework.logit_chunks))
