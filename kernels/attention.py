"""attention: softmax(q · kᵀ / √Dh) · v over the keys up to each query's own, where a kernel serves.

models/attention.py is the definition. torch's own kernel for this (scaled_dot_product_attention) took twice the time of
the C kernel (kernels/cpu/attention.h) for 4 rows of 256 tokens with the heads of SmolLM2.
"""

import torch
from torch import Tensor

from .dispatch import asked_backend


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """q (B, T, H, Dh), k and v (B, T, Kv, Dh), one document a row → (B, T, H, Dh), or None where torch's serves.

    Differentiable in all three.
    """
    if torch.compiler.is_compiling() or asked_backend() not in ("auto", "cpu"):
        return None
    from .cpu import attention  # the C kernels are a backend like any other: this file does not need them

    return attention.CausalAttention.apply(q, k, v) if attention.serves(q, k, v) else None
