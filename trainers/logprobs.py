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


def unpadded_logps(model: Decoder, input_ids: Tensor, segment_ids: Tensor, completion_mask: Tensor) -> Tensor:
    """per_token_logps of rows that are one example each, with no padding computed: fp32 (B, T-1).

    The rows run end to end as one of N tokens, each a document of its own; then each number goes back to its place.
    """
    real = segment_ids != 0
    rows = torch.arange(1, len(input_ids) + 1, device=input_ids.device)[:, None].expand_as(real)
    counted = completion_mask.clone()
    counted[:, 0] = 0  # nothing of its own row stands before a first token
    logps = per_token_logps(model, input_ids[real][None], rows[real][None], counted[real][None])[0]  # (N-1,)
    first = logps.new_zeros(1)
    return logps.new_zeros(real.shape).masked_scatter(real, torch.cat([first, logps]))[:, 1:]


def sequence_logps(per_token_logps: Tensor, completion_mask: Tensor) -> Tensor:
    """Σ_t m_t · log p_t of each row: (B, T) and a mask of the same shape → (B,). What is masked may hold anything."""
    return torch.where(completion_mask != 0, per_token_logps, 0).sum(dim=1)
