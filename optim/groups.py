"""Parameter groups: matrices decay, vectors (norms, biases) do not.

Decay shrinks a weight towards zero. For a matrix that is a prior; for a norm's gain it would scale the layer away.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn


def decay_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer, in the order given: parameters of two or more dimensions decay, others do not."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for _, parameter in parameters:
        (matrices if parameter.ndim >= 2 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
