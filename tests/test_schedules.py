"""optim: every schedule against its formula, and which parameters decay."""

import math

import pytest
import torch
from torch import nn

from optim import decay_groups, learning_rate


def rates(schedule: str, total: int = 20, warmup: int = 4) -> list[float]:
    options = {"total_steps": total, "peak": 3.0, "warmup_steps": warmup, "schedule": schedule}
    return [learning_rate(step, **options) for step in range(total)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_rises_in_equal_steps_to_the_peak(schedule):
    assert rates(schedule)[:5] == pytest.approx([3 / 5, 6 / 5, 9 / 5, 12 / 5, 3.0])


def test_after_warm_up_each_schedule_follows_its_formula():
    progress = [(step - 4) / 16 for step in range(4, 20)]
    assert rates("constant")[4:] == [3.0] * 16
    assert rates("linear")[4:] == pytest.approx([3 * (1 - p) for p in progress])
    assert rates("cosine")[4:] == pytest.approx([1.5 * (1 + math.cos(math.pi * p)) for p in progress])


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="schedule must be one of constant, linear, cosine, got 'step'"):
        rates("step")


def test_matrices_decay_and_vectors_do_not():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    optimizer = torch.optim.AdamW(decay_groups(model.named_parameters(), 0.5), lr=0.1)
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert [p.detach().flatten()[0].item() for p in model.parameters()] == pytest.approx([1 - 0.1 * 0.5, 1, 1, 1])
