"""optim/groups: who decays, who moves faster, and that nobody is left out."""

import pytest
import torch
from torch import nn

from optim import PagedAdamW, decay_groups, loraplus_groups, set_learning_rate

NAMED = [
    ("q.lora_A.default", nn.Parameter(torch.ones(2, 3))),
    ("q.lora_B.default", nn.Parameter(torch.ones(4, 2))),
    ("norm.weight", nn.Parameter(torch.ones(4))),
    ("k.lora_B.default", nn.Parameter(torch.ones(5, 2))),
]


def test_loraplus_gives_every_b_the_ratio_and_everything_else_the_plain_rate():
    groups = loraplus_groups(NAMED, 0.1, 16.0)
    optimizer = PagedAdamW(groups)
    set_learning_rate(optimizer, 0.01)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    rates = {name: found[id(parameter)] for name, parameter in NAMED}
    assert rates == {
        "q.lora_A.default": (0.01, 0.1),
        "q.lora_B.default": (0.16, 0.1),
        "norm.weight": (0.01, 0.0),
        "k.lora_B.default": (0.16, 0.1),
    }


def test_a_step_moves_b_by_the_ratio_more():
    optimizer = PagedAdamW(loraplus_groups(NAMED, 0.0, 16.0))
    for _, parameter in NAMED:
        parameter.grad = torch.full_like(parameter, 0.5)
    before = [parameter.detach().clone() for _, parameter in NAMED]
    set_learning_rate(optimizer, 0.001)
    optimizer.step()
    moved = [(b - p.detach()).mean().item() for b, (_, p) in zip(before, NAMED, strict=True)]
    assert moved == pytest.approx([0.001, 0.016, 0.001, 0.016], rel=1e-3)


def test_decay_groups_have_no_factor_and_all_parameters():
    groups = decay_groups(NAMED, 0.1)
    assert [len(group["params"]) for group in groups] == [3, 1]
    optimizer = PagedAdamW(groups)
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_loraplus_without_adapters_is_refused():
    with pytest.raises(ValueError, match="LoRA\\+ needs parameters called lora_B"):
        loraplus_groups([("weight", nn.Parameter(torch.ones(2, 2)))], 0.0, 16.0)
