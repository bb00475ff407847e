"""One new token a row: what generate runs again and again.

    x = embed_tokens[tokens];  all layers, over the cache;  hidden = RMSNorm(x)

The layers run in one call where a kernel takes them all (kernels/decode.py), else as models/decoder.py says.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import kernels.decode
from lora import LinearNF4
from lora.adapters import base_of
from lora.linear import projection
from lora.saved_module import in_use

from .attention import rope_scale, rope_tables
from .decoder import Decoder
from .kv_cache import KVCache

Step = Callable[[Tensor, KVCache], Tensor]
"""(tokens int64 (R,), a cache of R rows of one document each) → hidden states (R, D) under the head"""


def decoding_step(model: Decoder) -> Step:
    """The step for the weights and adapters that are on now, in eval mode and without gradients."""
    run = kernels.decode.decode_step(_layers(model), _shape(model)) if _in_4_bits(model) else None
    if run is None:
        return lambda tokens, cache: model(tokens[:, None], cache=cache, return_hidden=True)[:, 0]
    frequencies, scale = model._frequencies, rope_scale(model.config)

    def step(tokens: Tensor, cache: KVCache) -> Tensor:
        positions, entries = cache.next_entries()
        cos, sin = rope_tables(positions[:, None], frequencies, scale)
        x = model.model.embed_tokens(tokens).to(model.compute_dtype)
        run(x, cos, sin, entries)
        return model.model.norm(x)

    return step


def _in_4_bits(model: Decoder) -> bool:
    """Whether every matrix of the layers is, on the CPU and whole, with or without adapters."""
    matrices = [_matrices(layer) for layer in model.model.layers]
    bases = [base_of(in_use(matrix)) for layer in matrices for matrix in layer]
    return all(isinstance(b, LinearNF4) and type(b.packed.data) is Tensor and b.packed.is_cpu for b in bases)


def _matrices(layer: Any) -> tuple[nn.Module, ...]:
    a, m = layer.self_attn, layer.mlp
    return a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj


def _layers(model: Decoder) -> list[kernels.decode.Layer]:
    layers: list[Any] = list(model.model.layers)
    return [
        kernels.decode.Layer(
            tuple(projection(in_use(matrix)) for matrix in _matrices(layer)),
            (_gain(layer.input_layernorm), _gain(layer.post_attention_layernorm)),
            _head_norms(layer.self_attn),
            layer.self_attn.has_rope,
        )
        for layer in layers
    ]


def _head_norms(attention: Any) -> tuple[Tensor, Tensor] | None:
    if attention.q_norm is None or attention.k_norm is None:
        return None
    return _gain(attention.q_norm), _gain(attention.k_norm)


def _gain(norm: nn.Module) -> Tensor:
    return in_use(norm).weight  # type: ignore[return-value]


def _shape(model: Decoder) -> kernels.decode.Shape:
    c = model.config
    return kernels.decode.Shape(
        c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rms_norm_eps, model.compute_dtype
    )
