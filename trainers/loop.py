"""What every trainer's loop does: one optimizer step over a window of micro-batches, and evaluation.

A window is all the rows of one update, over all micro-batches and all ranks. Each loss is a sum over its items divided
by `num_items`, the item count of the whole window, known before the first forward. The gradients of the micro-batches
then add up to the gradient of the window, however it is cut: 1 × 8 rows equal 8 × 1, with rows of any length. (A mean
of micro-batch means would weigh tokens in short rows more.)
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from data.batch import Batch
from optim import set_learning_rate

from . import world
from .safety import Skips

MicroBatch = TypeVar("MicroBatch")
Row = TypeVar("Row")


def train_step(
    micro_batches: Sequence[MicroBatch],
    loss_of: Callable[[MicroBatch], Tensor],
    parameters: Sequence[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    *,
    learning_rate: float,
    max_grad_norm: float,
    skips: Skips | None = None,
) -> tuple[float, float]:
    """One update; loss_of gives a micro-batch's share of the window's loss. Returns (loss, gradient norm unclipped).

    Raises ValueError when a trainable parameter gets no gradient, or the loss or a gradient is not finite (more often
    than `skips` allows; else the update is left out); the parameters are then as before the step.
    """
    optimizer.zero_grad(set_to_none=True)
    loss = 0.0
    for micro_batch in micro_batches:
        share = loss_of(micro_batch)
        share.backward()
        loss += share.item()
    loss = world.sum_over_world(loss)
    check_gradients(parameters)
    tensors = [parameter for _, parameter in parameters]
    world.sum_gradients(tensors)
    grad_norm = float(nn.utils.clip_grad_norm_(tensors, max_grad_norm if max_grad_norm > 0 else math.inf))
    if (skips or Skips(allowed=0)).is_good(loss, grad_norm):
        set_learning_rate(optimizer, learning_rate)
        optimizer.step()
    return loss, grad_norm


class Window(NamedTuple):
    """What the batches of one update hold, over all ranks."""

    examples: int
    tokens: int
    """text, padding left out"""
    learnt_tokens: int
    padding: float
    """share of the tensors' cells"""


def count_window(batches: Sequence[Batch]) -> Window:
    """What all ranks' batches of this update hold; `learnt_tokens` is the update's num_items."""
    mine = (
        sum(int(batch.segment_ids.amax(dim=1).sum()) for batch in batches),
        sum(int((batch.segment_ids > 0).sum()) for batch in batches),
        sum(int(batch.completion_mask[:, 1:].sum()) for batch in batches),
        sum(batch.input_ids.numel() for batch in batches),
    )
    examples, tokens, learnt, cells = (int(world.sum_over_world(count)) for count in mine)
    return Window(examples, tokens, learnt, 1 - tokens / cells)


def check_gradients(parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Raises ValueError when a trainable parameter took no part in the loss: it would silently stay untrained."""
    missing = [name for name, parameter in parameters if parameter.grad is None]
    if missing:
        raise ValueError(f"{len(missing)} trainable parameters got no gradient, the first {missing[0]}")


def split(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    """Rows in micro-batches of at most `size`."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Sequence[MicroBatch], nll_of: Callable[[MicroBatch], tuple[Tensor, int]]
) -> float:
    """Mean loss per item over all batches; nll_of gives (sum, items). The model is in eval mode meanwhile."""
    was_training = model.training
    model.eval()
    try:
        sums = [nll_of(batch) for batch in batches]
    finally:
        model.train(was_training)
    return sum(float(total) for total, _ in sums) / max(1, sum(items for _, items in sums))
