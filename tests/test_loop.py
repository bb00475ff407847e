"""trainers/loop: one step equals torch by hand; clipping, missing gradients and non-finite numbers."""

import copy

import pytest
import torch
from torch import nn

from trainers.loop import evaluate, split, train_step


def model_and_batches():
    torch.manual_seed(3)
    return nn.Linear(4, 1), [torch.randn(n, 4) for n in (1, 3, 2)]


def step(model, batches, optimizer, clip=0.0):
    def loss_of(batch):
        return model(batch).square().sum() / 6

    return train_step(
        batches, loss_of, list(model.named_parameters()), optimizer, learning_rate=0.1, max_grad_norm=clip
    )


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_a_step_over_micro_batches_is_a_step_over_all_rows(clip):
    model, batches = model_and_batches()
    other = copy.deepcopy(model)
    loss, grad_norm = step(model, batches, torch.optim.SGD(model.parameters(), lr=0.0), clip)
    whole = other(torch.cat(batches)).square().mean()
    whole.backward()
    norm = torch.cat([p.grad.flatten() for p in other.parameters()]).norm()
    assert loss == pytest.approx(whole.item(), rel=1e-6)
    assert grad_norm == pytest.approx(norm.item(), rel=1e-6)
    factor = min(1.0, clip / norm.item()) if clip else 1.0
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), (q - 0.1 * factor * q.grad).detach())


def test_a_parameter_that_takes_no_part_is_named():
    model, batches = model_and_batches()
    parameters = [*model.named_parameters(), ("unused", nn.Parameter(torch.zeros(2)))]
    optimizer = torch.optim.SGD([p for _, p in parameters], lr=0.1)
    with pytest.raises(ValueError, match="1 trainable parameters got no gradient, the first unused"):
        train_step(batches, lambda b: model(b).sum(), parameters, optimizer, learning_rate=0.1, max_grad_norm=1.0)


def test_a_non_finite_gradient_leaves_the_parameters_alone():
    model, batches = model_and_batches()
    before = copy.deepcopy(model.state_dict())
    batches[1][0, 0] = float("inf")
    with pytest.raises(ValueError, match="training needs finite numbers"):
        step(model, batches, torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_evaluate_is_the_mean_over_items_and_restores_the_mode():
    model, batches = model_and_batches()
    model.train()
    mean = evaluate(model, batches, lambda b: (model(b).abs().sum(), len(b)))
    assert model.training
    assert mean == pytest.approx(model(torch.cat(batches)).abs().mean().item(), rel=1e-6)
    assert [list(part) for part in split([1, 2, 3], 2)] == [[1, 2], [3]]
