"""Direct preference optimisation: a model learns from pairs of answers which one people prefer, without a reward model.

    s_c = log π(y_c | x) - log π_ref(y_c | x)        of the chosen answer, summed over its tokens; s_r of the rejected
    L   = -log σ(β · (s_c - s_r))                    DPO, Rafailov et al. 2023, arXiv 2305.18290, eq. 7

β·s is the implicit reward. Its gradient raises y_c and lowers y_r, the more the surer the model is of the wrong order:
σ(β·(s_r - s_c)). At the first step π = π_ref, so L = ln 2 and the gradient is β/2 times that of s_r - s_c. Variants,
with δ = s_c - s_r:

    sigmoid        -(1-ε)·log σ(βδ) - ε·log σ(-βδ)              ε = 0 is DPO; ε > 0 cDPO: labels are wrong that often
    robust         [-(1-ε)·log σ(βδ) + ε·log σ(-βδ)] / (1-2ε)   unbiased under such labels (arXiv 2403.00409)
    hinge          max(0, 1 - βδ)                               SLiC (arXiv 2305.10425)
    ipo            (s_c/n_c - s_r/n_r - 1/(2β))²                IPO as its authors run it: means over n tokens
    ipo_sum        (δ - 1/(2β))²                                IPO as the paper writes it (arXiv 2310.12036, eq. 17)
    sigmoid_norm   -log σ(β·(s_c/n_c - s_r/n_r))                length-normalised DPO (Tülu 3, arXiv 2411.15124)

    RPO            L + α · (-log π(y_c | x) / n_c)              keeps log π(y_c) from falling (arXiv 2404.19733, eq. 1)

    B pairs, T tokens

Left out: f-divergences, losses over sorted batches (AOT), several losses at once, a reference that moves.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

LossType = Literal["sigmoid", "robust", "hinge", "ipo", "ipo_sum", "sigmoid_norm"]
LOSS_TYPES: tuple[LossType, ...] = get_args(LossType)
SMOOTHED = ("sigmoid", "robust")


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, rewards of the chosen, rewards of the rejected answers), each (B,); rewards carry no gradient.

    The four logps (B,) are sums over an answer's tokens, the lengths (B,) their number; 0 counts as 1. Raises
    ValueError for an unknown loss_type, a setting outside its range, and lengths missing where the loss is of means.
    """
    check_dpo(beta, loss_type, label_smoothing)
    chosen, rejected = policy_chosen_logps - ref_chosen_logps, policy_rejected_logps - ref_rejected_logps
    rewards = beta * chosen.detach(), beta * rejected.detach()
    if loss_type in ("ipo", "sigmoid_norm"):
        if chosen_lengths is None or rejected_lengths is None:
            raise ValueError(f"loss_type {loss_type} is of means over tokens: it needs both lengths")
        chosen, rejected = chosen / chosen_lengths.clamp(min=1), rejected / rejected_lengths.clamp(min=1)
    delta, eps = chosen - rejected, label_smoothing
    if loss_type in ("ipo", "ipo_sum"):
        losses = (delta - 1 / (2 * beta)) ** 2
    elif loss_type == "hinge":
        losses = torch.relu(1 - beta * delta)
    elif loss_type == "robust":
        losses = (-(1 - eps) * F.logsigmoid(beta * delta) + eps * F.logsigmoid(-beta * delta)) / (1 - 2 * eps)
    else:
        losses = -(1 - eps) * F.logsigmoid(beta * delta) - eps * F.logsigmoid(-beta * delta)
    return losses, *rewards


def rpo_term(policy_chosen_logps: Tensor, chosen_lengths: Tensor) -> Tensor:
    """-log π(y_c | x) / n_c, (B,): the chosen answer's own negative log-likelihood a token; 0 without a token."""
    return -policy_chosen_logps / chosen_lengths.clamp(min=1)


def check_dpo(beta: float, loss_type: str, label_smoothing: float) -> None:
    """Raises ValueError for settings that make no loss."""
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}")
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be above 0, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")
    if label_smoothing and loss_type not in SMOOTHED:
        raise ValueError(f"label_smoothing is for loss_type {' and '.join(SMOOTHED)}, not for {loss_type}")
