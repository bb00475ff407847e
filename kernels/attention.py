"""attention: softmax(q · kᵀ / √Dh) · v over the keys up to each query's own, where a kernel serves.

models/attention.py is the definition. torch's own kernel for this (scaled_dot_product_attention) took twice the time of
the C kernel (kernels/cpu/attention.h) for 4 rows of 256 tokens with the heads of SmolLM2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import asked_backend


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    runs: Sequence[tuple[int, int, int]] | None = None,
    prefixes: Sequence[int | None] | None = None,
) -> Tensor | None:
    """q (B, T, H, Dh), k and v (B, T, Kv, Dh) → (B, T, H, Dh), or None where torch's serves.

    runs: (row, start, stop) of every document, one a row by default; what lies between them gets zeros. prefixes: for
    each document, the number in `runs` of the one it continues, or None: its tokens attend to all of that one too.
    Differentiable in all three.
    """
    if torch.compiler.is_compiling() or asked_backend() not in ("auto", "cpu"):
        return None
    from .cpu import attention  # the C kernels are a backend like any other: this file does not need them

    who = None if runs is None else tuple(runs), None if prefixes is None else tuple(prefixes)
    if not attention.serves(q, k, v, *who):
        return None
    return attention.CausalAttention.apply(q, k, v, attention.cut(*q.shape[:2], *who))
