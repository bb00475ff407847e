"""Estimates of what a step holds for a while: activations, a part of the logits, a backward's workspace, a KV cache.

Kept for backward, a token and layer, with s bytes an activation (elementwise.py, recompute.py, lora_matmul.py):

    inputs of both norms                  2·D·s + 8             and their 1/rms; what they return is computed again
    q, k, v after rope, and the output    (2·H + 2·Kv)·Dh·s     attention keeps all four
    its log-sum-exp                       4·H
    gate and up                           2·I·s                 their product is computed again
    x · Aᵀ of each adapter                n·r·s

Rows of several documents (dpo, orpo and grpo put all rows into one) copy the attention's output where no kernel takes
them whole: H·Dh·s more; a completion behind a shared prompt then has its own copy of that prompt's keys and values.
Gradient checkpointing keeps D·s a layer; backward then holds one layer whole, its norms' outputs among it.

    D hidden_size, H heads, Kv key-value heads, Dh head_dim, I intermediate_size, r rank, n target modules, V vocabulary
    M tokens that are predicted, m of them in a chunk

The factors beside I and V are counts of the tensors that live at once where each function peaks.
"""

from kernels.linear_cross_entropy import CHUNK_BYTES
from kernels.vocabulary_tiles import ROWS, TILE
from models import DecoderConfig

from .memory_exact import layer_linears
from .memory_setup import Setup


def activations(config: DecoderConfig, setup: Setup) -> int:
    """Bytes kept between forward and backward."""
    s, D = setup.itemsize, config.hidden_size
    each = D * s if setup.gradient_checkpointing else _a_layer(config, setup)
    kept = setup.tokens * (config.num_hidden_layers * each + 2 * D * s)  # the last norm's input and output
    if not setup.gradient_checkpointing:
        kept += config.num_hidden_layers * _copied_prompts(config, setup)
    return kept


def head_chunk(config: DecoderConfig, setup: Setup) -> int:
    """The output layer's forward: a chunk or tile of logits, and of all predictions their hidden states' gradient."""
    s, D, V, M = setup.itemsize, config.hidden_size, config.vocab_size, setup.predictions
    m = _chunk_rows(V, M)
    if setup.trainer == "distill":
        other = V if setup.teacher is None else setup.teacher.vocab_size
        m = _chunk_rows(V + (0 if setup.teacher is None else other), M)
        teachers_hidden = 0 if setup.teacher is None else 2 * setup.teacher.hidden_size * s
        return m * 28 * V + M * (8 * D + teachers_hidden)
    if setup.dtype == "fp32" and setup.method == "full":
        return _tile_of_logits(M) + M * s * D
    if setup.dtype == "fp32" or (setup.method != "full" and not setup.on_gpu):
        rounded = 0 if s == 4 else _tile_of_logits(M) // 2  # beside the tile, for its product with W
        return _tile_of_logits(M) + rounded + M * 8 * D
    entropy = setup.trainer == "grpo"
    if setup.method == "full":
        return m * V * (16 if entropy else 8) + M * s * D
    return m * V * (16 if entropy else 10) + M * (6 if entropy else 8) * D


def head_backward(config: DecoderConfig, setup: Setup) -> int:
    """Of a head that is trained: its logits once more, its gradient in fp32, and what a chunk adds to that."""
    if setup.method != "full":
        return 0
    s, D, V, M = setup.itemsize, config.hidden_size, config.vocab_size, setup.predictions
    if setup.dtype == "fp32" and setup.trainer != "distill":
        return _tile_of_logits(M) + V * D * 4 + M * 12 * D
    m = _chunk_rows(V, M)
    cast = 0 if s == 4 else 2
    return m * V * (8 + cast) + V * D * (8 + cast) + M * (8 + s) * D


def layer_backward(config: DecoderConfig, setup: Setup) -> int:
    """Backward of one layer: where SwiGLU's peaks. A GPU makes a 4-bit weight dense for its product."""
    s, inner = setup.itemsize, config.intermediate_size
    bf16 = 26 if setup.on_gpu else 10  # torch's SwiGLU, or one in a pass
    swiglu = setup.tokens * inner * (16 if s == 4 else bf16)
    dense = max(N * K for N, K in layer_linears(config).values()) * s if setup.on_gpu and setup.method == "qlora" else 0
    return swiglu + dense + (_whole_layer(config, setup) if setup.gradient_checkpointing else 0)


def sampling(config: DecoderConfig, setup: Setup) -> tuple[int, int]:
    """(the KV cache of all completions of a batch of rollouts, workspace of a new token for each)."""
    rows = setup.batch_size * setup.accumulation
    windows = config.windows or (None,) * config.num_hidden_layers
    entries = sum(min(window or setup.sequence_length, setup.sequence_length) for window in windows)
    cache = rows * entries * 2 * config.num_key_value_heads * config.head_dim * setup.itemsize
    return cache, rows * config.vocab_size * 16


def _a_layer(config: DecoderConfig, setup: Setup) -> int:
    """Bytes that one layer keeps for one token."""
    s, D, H = setup.itemsize, config.hidden_size, config.num_attention_heads
    copied = setup.trainer in ("dpo", "orpo", "grpo") and not _taken_whole(config, setup)
    heads = (3 if copied else 2) * H + 2 * config.num_key_value_heads
    adapters = len(setup.targets) * setup.r * s if setup.method != "full" else 0
    return 2 * D * s + 8 + heads * config.head_dim * s + 4 * H + 2 * config.intermediate_size * s + adapters


def _whole_layer(config: DecoderConfig, setup: Setup) -> int:
    """What recomputing a layer holds beside SwiGLU's workspace: norms' outputs too, but one input less."""
    s, D, inner = setup.itemsize, config.hidden_size, config.intermediate_size
    kept = setup.tokens * (_a_layer(config, setup) + D * s - (2 * inner * s if s == 2 else 0))
    return kept + _copied_prompts(config, setup)


def _taken_whole(config: DecoderConfig, setup: Setup) -> bool:
    """Whether a kernel takes rows of several documents (kernels/cpu/attention.py)."""
    windows = [window for window in config.windows if window is not None]
    fits = config.head_dim % 32 == 0 and all(window >= setup.sequence_length for window in windows)
    return fits and not setup.on_gpu


def _copied_prompts(config: DecoderConfig, setup: Setup) -> int:
    """Of one layer: each completion's keys and values with its prompt's before them, and its mask."""
    if setup.trainer != "grpo" or _taken_whole(config, setup):
        return 0
    L = setup.max_completion_length - 1
    S = setup.sequence_length - 1
    kv = 2 * config.num_key_value_heads * config.head_dim * setup.itemsize
    return setup.batch_size * (S * kv + L * S)


def _tile_of_logits(rows: int) -> int:
    return min(rows, ROWS) * TILE * 4


def _chunk_rows(width: int, rows: int) -> int:
    return min(rows, max(1, CHUNK_BYTES // (4 * width)))
