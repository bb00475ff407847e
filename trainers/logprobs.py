"""Log-probabilities of given tokens under a model, without ever holding logits for all of them.

B rows, T tokens, V vocabulary, D hidden size. Position t predicts token t+1, so T tokens give T-1 predictions.
"""

import torch
from torch import Tensor

from kernels import linear_cross_entropy
from models import Decoder


def per_token_nll(
    model: Decoder, input_ids: Tensor, segment_ids: Tensor, completion_mask: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """-log p(token t+1 | tokens ≤ t) where completion_mask counts token t+1, 0 elsewhere: fp32 (B, T-1).

    input_ids, segment_ids (0 = padding), completion_mask: int64 (B, T). Only counted positions reach the output layer.
    """
    hidden = model(input_ids, segment_ids=segment_ids, return_hidden=True)[:, :-1]  # (B, T-1, D)
    targets = torch.where(completion_mask[:, 1:] != 0, input_ids[:, 1:], -100)
    nll = linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]), model.head(), targets.reshape(-1), temperature=temperature
    )
    return nll.view(targets.shape)


def per_token_logps(
    model: Decoder, input_ids: Tensor, segment_ids: Tensor, completion_mask: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """log p of each counted token, 0 elsewhere: fp32 (B, T-1)."""
    return -per_token_nll(model, input_ids, segment_ids, completion_mask, temperature=temperature)


def sequence_logps(per_token_logps: Tensor, completion_mask: Tensor) -> Tensor:
    """Σ_t m_t · log p_t of each row: (B, T) and a mask of the same shape → (B,). What is masked may hold anything."""
    return torch.where(completion_mask != 0, per_token_logps, 0).sum(dim=1)
