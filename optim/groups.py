"""Parameter groups: matrices decay, vectors (norms, biases) do not; LoRA+ gives B a larger rate than A.

Decay shrinks a weight towards zero. For a matrix that is a prior; for a norm's gain it would scale the layer away.

LoRA+ (arXiv 2402.12354): η_B = ratio · η_A. With one rate for both, the features of wide models are hardly learnt: A
and B should move at rates that grow apart with the width. The paper suggests a ratio about 16.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

RATE_FACTOR = "rate_factor"  # of a group: its rate is this times the schedule's


def decay_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer, in the order given: parameters of two or more dimensions decay, others do not."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for _, parameter in parameters:
        (matrices if parameter.ndim >= 2 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def loraplus_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float, ratio: float
) -> list[dict[str, Any]]:
    """decay_groups of everything but lora_B, and of lora_B, whose groups carry rate_factor = ratio.

    Raises ValueError when nothing is called lora_B.
    """
    named = list(parameters)
    lora_b = [(name, parameter) for name, parameter in named if "lora_B" in name]
    if not lora_b:
        raise ValueError("LoRA+ needs parameters called lora_B, and there are none: train with lora or qlora")
    others = [(name, parameter) for name, parameter in named if "lora_B" not in name]
    faster = [group | {RATE_FACTOR: ratio} for group in decay_groups(lora_b, weight_decay)]
    return [*decay_groups(others, weight_decay), *faster]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The schedule's rate for every group, times the group's factor where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(RATE_FACTOR, 1.0)
