"""DoRA: how long a row is, and where it points, trained apart (arXiv 2402.09353, eq. 5).

    W' = m ⊙ V / ‖V‖         V = W₀ + s · B A        ‖·‖ of each row: one number for each output, as PEFT has it
    h  = c ⊙ (V x) + b       c = m / ‖V‖, which is kernels.lora_matmul's row_scale

    m (N,), trained, ‖W₀‖ at the start: so c = 1 and the first forward is the base model's.

‖V‖ counts as a constant in backward (section 4.3 of the paper): the gradient takes c's m alone.

V is never built, nor W₀ dequantized, to measure it: for a row n,

    ‖V‖² = ‖W₀‖² + 2 s ⟨W₀, B A⟩ + s² ‖B A‖²
    ⟨W₀, B A⟩ = Σ_j B_nj (A W₀ᵀ)_jn            ‖B A‖² = Σ_j B_nj (B · A Aᵀ)_nj

so that it costs a product of r rows with W₀. Done otherwise than in PEFT: dropout acts on the input of A alone, where
PEFT's also acts on (c - 1) · W₀ x. Left out: DoRA on embeddings and on the output head.
"""

import torch
from torch import Tensor

import kernels
from quant import QuantizedTensor


def row_norms(weight: Tensor | QuantizedTensor) -> Tensor:
    """‖W₀‖ of each row of (N, K), fp32 (N,)."""
    dense = kernels.dequantize(weight, torch.float32) if isinstance(weight, QuantizedTensor) else weight
    return torch.linalg.vector_norm(dense, dim=1, dtype=torch.float32)


@torch.no_grad()
def sum_norms(base: Tensor | QuantizedTensor, base_norms: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """‖W₀ + s·BA‖ of each row, fp32 (N,). base (N, K); base_norms (N,) its row_norms; A (r, K), B (N, r) in fp32."""
    A_W = kernels.matmul(A, base) if isinstance(base, QuantizedTensor) else kernels.linear(A, base)  # A W₀ᵀ (r, N)
    across = (B * A_W.T).sum(1)
    own = (B * (B @ (A @ A.T))).sum(1)
    return (base_norms.square() + 2 * scaling * across + scaling**2 * own).clamp_min(0).sqrt()


def row_scale(magnitude: Tensor, norms: Tensor) -> Tensor:
    """c = m / ‖V‖ (N,); 1 / ‖V‖ of an all-zero row counts as 1."""
    return magnitude / norms.where(norms > 0, 1)
