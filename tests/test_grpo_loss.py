"""trainers/grpo: advantages and loss against float64 loops from the papers, with gradients; first step, extremes."""

import itertools
import math

import pytest
import torch

from tests import reference_grpo as reference
from trainers.grpo import LEVELS, LOSS_TYPES, SCALES, group_advantages, grpo_loss, loss_items

EPS = torch.finfo(torch.float64).eps
B, T, MAX_LENGTH = 6, 5, 9
KINDS = list(itertools.product(LOSS_TYPES, LEVELS))
COMBINATIONS = list(itertools.product(LOSS_TYPES, LEVELS, (None, 1.35), (0.0, 0.04), (None, 17)))


def inputs(seed=0, spread=0.4):
    """logps, old, ref (B, T) in float64, advantages (B,), and a mask with a single token, an empty and a full row."""
    generator = torch.Generator().manual_seed(seed)
    logps, old, ref = (-1 + spread * torch.randn(B, T, generator=generator, dtype=torch.float64) for _ in range(3))
    advantages = torch.randn(B, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([5, 1, 0, 3, 4, 2])
    return logps, old, ref, advantages, (torch.arange(T) < lengths[:, None]).long()


def both(logps, old, advantages, mask, **settings):
    """(loss, gradient, metrics) of ours and of the reference."""
    logps = logps.clone().requires_grad_()
    loss, metrics = grpo_loss(logps, old, advantages, mask, **settings)
    (gradient,) = torch.autograd.grad(loss, logps)
    settings["level"] = settings.pop("importance_sampling_level", "token")
    ref = settings.pop("ref_per_token_logps", None)
    settings = {key: value for key, value in settings.items() if value is not None}
    if ref is not None:
        settings["ref_logps"] = ref.tolist()
    wanted = reference.grpo_loss(logps.tolist(), old.tolist(), advantages.tolist(), mask.tolist(), **settings)
    return loss.item(), gradient, metrics, wanted


@pytest.mark.parametrize(("loss_type", "level", "delta", "beta", "num_items"), COMBINATIONS)
def test_loss_gradient_and_metrics_are_the_papers(loss_type, level, delta, beta, num_items):
    for seed in range(3):
        logps, old, ref, advantages, mask = inputs(seed)
        loss, gradient, metrics, wanted = both(
            logps, old, advantages, mask, loss_type=loss_type, importance_sampling_level=level, delta=delta, beta=beta,
            ref_per_token_logps=ref if beta else None, epsilon=0.2, epsilon_high=0.28, num_items=num_items,
            max_completion_length=MAX_LENGTH,
        )  # fmt: skip
        assert loss == pytest.approx(wanted.loss, abs=64 * EPS)
        torch.testing.assert_close(gradient, torch.tensor(wanted.gradient, dtype=torch.float64), rtol=0, atol=64 * EPS)
        assert metrics["clip_ratio/low"] == pytest.approx(wanted.low)
        assert metrics["clip_ratio/high"] == pytest.approx(wanted.high)
        assert metrics["ratio/mean_abs_log"] == pytest.approx(wanted.mean_abs_log)
        assert metrics["tokens"] == 15
        if beta:
            assert metrics["kl"] == pytest.approx(wanted.kl, rel=1e-9)


def test_the_inputs_above_reach_every_branch():
    """Clipped below and above, bounded by delta, and free: a test of a formula that never branches proves little."""
    logps, old, _, advantages, mask = inputs(0)
    ratio, counted, A = (logps - old).exp(), mask == 1, advantages[:, None].expand(B, T)
    for branch in (
        (ratio < 0.8) & (A < 0),
        (ratio > 1.28) & (A > 0),
        (ratio > 1.35) & (A < 0),
        (ratio - 1).abs() < 0.2,
    ):
        assert (branch & counted).any()


@pytest.mark.parametrize("scale", SCALES)
def test_advantages_are_the_papers(scale):
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rewards[4:8] = 0.3  # no spread
    rewards[9] = math.nan
    wanted = reference.group_advantages(rewards.tolist(), 4, scale=scale, eps=1e-4)
    found = group_advantages(rewards, 4, scale=scale)
    assert found.tolist() == pytest.approx(wanted, abs=4 * torch.finfo(torch.float32).eps)
    assert found[4:8].tolist() == [0.0] * 4
    assert found[9] == 0


def test_rewards_that_are_all_missing_or_alone_give_no_advantage():
    missing = torch.full((4,), math.nan)
    for scale in SCALES:
        assert group_advantages(missing, 2, scale=scale).tolist() == [0.0] * 4
        assert group_advantages(torch.tensor([1.0, 2.0]), 1, scale=scale).tolist() == [0.0] * 2


def test_equal_rewards_that_fp32_cannot_average_have_no_advantage():
    """fp32's mean of seven 0.1 is not 0.1: the difference over eps would be a false advantage."""
    assert group_advantages(torch.full((7,), 0.1), 7).tolist() == [0.0] * 7


@pytest.mark.parametrize(("loss_type", "level"), KINDS)
def test_the_first_step_is_minus_the_mean_advantage_with_a_gradient(loss_type, level):
    """Policy equals sampler: with advantages that sum to 0 over equal lengths the loss is 0, its gradient is not."""
    logps = inputs()[0].requires_grad_()
    advantages = group_advantages(torch.randn(B, generator=torch.Generator().manual_seed(2)), 3)
    loss, metrics = grpo_loss(
        logps, None, advantages.double(), torch.ones(B, T), loss_type=loss_type, importance_sampling_level=level,
        max_completion_length=T,
    )  # fmt: skip
    assert loss.item() == pytest.approx(-advantages.double().mean().item(), abs=8 * EPS)
    assert abs(loss.item()) < 1e-6
    (gradient,) = torch.autograd.grad(loss, logps)
    wanted = -advantages.double()[:, None].expand(B, T) / (B * T)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=8 * EPS)
    assert metrics["ratio/min"] == metrics["ratio/max"] == 1
    assert metrics["clip_ratio/low"] == metrics["clip_ratio/high"] == 0


def test_gspo_token_has_gspos_value_and_gradient():
    logps, old, _, advantages, mask = inputs(3)
    results = []
    for level in ("sequence", "sequence_token"):
        x = logps.clone().requires_grad_()
        loss, _ = grpo_loss(x, old, advantages, mask, loss_type="grpo", importance_sampling_level=level)
        results.append((loss.item(), torch.autograd.grad(loss, x)[0]))
    assert results[0][0] == pytest.approx(results[1][0], abs=8 * EPS)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=8 * EPS)


@pytest.mark.parametrize(("loss_type", "level"), KINDS)
def test_a_window_cut_in_any_way_gives_one_loss_and_gradient(loss_type, level):
    logps, old, ref, advantages, mask = inputs(4)

    def window(size):
        x, total = logps.clone().requires_grad_(), 0.0
        for start in range(0, B, size):
            part = slice(start, start + size)
            share, _ = grpo_loss(
                x[part], old[part], advantages[part], mask[part], ref_per_token_logps=ref[part], beta=0.1,
                loss_type=loss_type, importance_sampling_level=level, max_completion_length=MAX_LENGTH,
                num_items=loss_items(loss_type, mask),
            )  # fmt: skip
            total = total + share
        return total.item(), torch.autograd.grad(total, x)[0]

    whole = window(B)
    for size in (1, 2, 4):
        loss, gradient = window(size)
        assert loss == pytest.approx(whole[0], abs=8 * EPS)
        torch.testing.assert_close(gradient, whole[1], rtol=0, atol=8 * EPS)


@pytest.mark.parametrize(("loss_type", "level"), KINDS)
def test_nothing_counted_costs_nothing(loss_type, level):
    logps, old, ref, advantages, _ = (x.float() for x in inputs())
    logps.requires_grad_()
    loss, metrics = grpo_loss(
        logps, old, advantages, torch.zeros(B, T), ref_per_token_logps=ref, beta=1.0, loss_type=loss_type,
        importance_sampling_level=level, max_completion_length=MAX_LENGTH,
    )  # fmt: skip
    assert loss.item() == 0
    assert torch.autograd.grad(loss, logps)[0].eq(0).all()
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize(("loss_type", "level"), KINDS)
@pytest.mark.parametrize("far", [30.0, 1e4])
def test_extreme_differences_stay_finite(loss_type, level, far):
    logps = torch.tensor([[-far, 0.0], [0.0, -far], [-far, -far], [0.0, 0.0]], requires_grad=True)
    old, ref = logps.detach().flip(0), logps.detach().flip(1)
    loss, metrics = grpo_loss(
        logps, old, torch.tensor([1.0, -1.0, 0.0, -1e3]), torch.ones(4, 2), ref_per_token_logps=ref, beta=0.1,
        loss_type=loss_type, importance_sampling_level=level, max_completion_length=2,
    )  # fmt: skip
    assert math.isfinite(loss.item())
    assert torch.autograd.grad(loss, logps)[0].isfinite().all()
    assert all(math.isfinite(value) for value in metrics.values())


def test_what_stands_at_masked_positions_does_not_matter():
    logps, old, ref, advantages, mask = inputs(5)
    results = []
    for junk in (0.0, math.nan, -math.inf):
        x, *others = (torch.where(mask == 1, t, junk) for t in (logps, old, ref))
        x.requires_grad_()
        loss, metrics = grpo_loss(x, others[0], advantages, mask, ref_per_token_logps=others[1], beta=0.1)
        results.append((loss.item(), torch.autograd.grad(loss, x)[0].tolist(), metrics))
    assert results[0] == results[1] == results[2]


def test_settings_that_are_no_method_are_refused():
    logps, old, _, advantages, mask = inputs()
    for settings, message in (
        ({"loss_type": "ppo"}, "loss_type must be one of dapo, grpo, bnpo, dr_grpo, got 'ppo'"),
        ({"importance_sampling_level": "word"}, "must be one of token, sequence, sequence_token, got 'word'"),
        ({"beta": 0.1}, "beta 0.1 needs ref_per_token_logps"),
        ({"epsilon": 1.5}, r"epsilon must lie in \[0, 1\)"),
        ({"delta": 1.1}, r"delta must be above 1 \+ epsilon_high = 1.2, got 1.1"),
        ({"loss_type": "dr_grpo"}, "dr_grpo divides by max_completion_length"),
    ):
        with pytest.raises(ValueError, match=message):
            grpo_loss(logps, old, advantages, mask, **settings)
    with pytest.raises(ValueError, match="5 rewards are no whole number of groups of 2"):
        group_advantages(torch.zeros(5), 2)
    with pytest.raises(ValueError, match="scale must be one of group, batch, none, got 'std'"):
        group_advantages(torch.zeros(4), 2, scale="std")
