"""dpo_loss, rpo_term, orpo_loss, sequence_logps: values and gradients against float64 loops; extremes; ln 2 first."""

import math

import pytest
import torch
from torch import Tensor

from tests import reference_preference
from trainers.dpo import LOSS_TYPES, dpo_loss, rpo_term
from trainers.logprobs import sequence_logps
from trainers.orpo import log1mexp, orpo_loss

EPS = torch.finfo(torch.float32).eps
SMOOTHING = {"sigmoid": (0.0, 0.2), "robust": (0.0, 0.3)}
CASES = [(kind, eps) for kind in LOSS_TYPES for eps in SMOOTHING.get(kind, (0.0,))]


def summed(B: int = 7, scale: float = 20.0) -> list[Tensor]:
    """policy chosen, policy rejected, ref chosen, ref rejected: log-probabilities, the policy's with a gradient."""
    logps = [-scale * torch.rand(B, dtype=torch.float64) for _ in range(4)]
    return [logps[0].requires_grad_(), logps[1].requires_grad_(), *logps[2:]]


@pytest.mark.parametrize("beta", [0.05, 1.0])
@pytest.mark.parametrize(("kind", "eps"), CASES)
def test_dpo_is_the_papers_loss_in_value_and_gradient(kind: str, eps: float, beta: float) -> None:
    """Lengths of one token, and of none, among them."""
    logps, lengths = summed(), torch.randint(2, 9, (2, 7))
    lengths[:, 0], lengths[:, 1] = 1, 0
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        *logps, beta=beta, loss_type=kind, label_smoothing=eps, chosen_lengths=lengths[0], rejected_lengths=lengths[1]
    )
    losses.sum().backward()
    for i in range(7):
        policy, ref = [(pair[0][i].item(), pair[1][i].item()) for pair in (logps[:2], logps[2:])]
        wanted = reference_preference.dpo_pair(policy, ref, tuple(lengths[:, i].tolist()), beta, kind, eps)
        found = (losses[i].item(), logps[0].grad[i].item(), logps[1].grad[i].item())
        assert found == pytest.approx(wanted, rel=1e-12, abs=1e-13)
        assert chosen_rewards[i].item() == pytest.approx(beta * (policy[0] - ref[0]), rel=1e-12)
        assert rejected_rewards[i].item() == pytest.approx(beta * (policy[1] - ref[1]), rel=1e-12)
    assert not chosen_rewards.requires_grad


@pytest.mark.parametrize("kind", ["sigmoid", "sigmoid_norm"])
def test_the_first_step_is_ln_2_with_half_of_beta_for_a_gradient(kind: str) -> None:
    logps = summed()
    ref = [logp.detach() for logp in logps[:2]]
    ones = torch.ones(7)
    losses, *rewards = dpo_loss(*logps[:2], *ref, loss_type=kind, chosen_lengths=ones, rejected_lengths=ones)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([math.log(2)] * 7, rel=1e-12)
    assert logps[0].grad.tolist() == pytest.approx([-0.05] * 7)
    assert logps[1].grad.tolist() == pytest.approx([0.05] * 7)
    assert not torch.cat(rewards).any()


def test_label_smoothing_does_what_it_is_for() -> None:
    """Of pairs whose labels are wrong a share ε of the time, the mean robust loss is DPO's on the right labels, and
    cDPO is lowest where σ(βδ) = 1 - ε."""
    right, ref, eps = torch.tensor([3.0, -1.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64), 0.2
    losses = [dpo_loss(*pair, ref, ref, beta=1.0, loss_type="robust", label_smoothing=eps)[0]
              for pair in ((right, ref), (ref, right))]  # fmt: skip
    plain = dpo_loss(right, ref, ref, ref, beta=1.0)[0]
    assert ((1 - eps) * losses[0] + eps * losses[1]).tolist() == pytest.approx(plain.tolist(), rel=1e-12)
    best = torch.tensor([math.log((1 - eps) / eps)], requires_grad=True)
    zero = torch.zeros(1)
    dpo_loss(best, zero, zero, zero, beta=1.0, label_smoothing=eps)[0].sum().backward()
    assert abs(best.grad.item()) <= 2 * EPS


@pytest.mark.parametrize("kind", LOSS_TYPES)
@pytest.mark.parametrize("size", [1e4, 1e6])
def test_extreme_log_probabilities_give_finite_numbers(kind: str, size: float) -> None:
    policy = [torch.tensor([-size, 0.0, 0.0, -size]).requires_grad_(), torch.tensor([0.0, -size, 0.0, -size])]
    policy[1].requires_grad_()
    ref = [torch.tensor([0.0, -size, 0.0, -size]), torch.tensor([-size, 0.0, 0.0, -size])]
    lengths = torch.tensor([1, 1, 0, 3])
    losses, *_ = dpo_loss(*policy, *ref, loss_type=kind, chosen_lengths=lengths, rejected_lengths=lengths)
    losses.sum().backward()
    for tensor in (losses, policy[0].grad, policy[1].grad):
        assert tensor.isfinite().all()
    assert losses[0] > losses[2], "the wrong order costs more than none"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "dpo"}, "loss_type must be one of sigmoid, robust, .*, got 'dpo'"),
        ({"beta": 0.0}, "beta must be above 0, got 0.0"),
        ({"beta": math.nan}, "beta must be above 0, got nan"),
        ({"label_smoothing": 0.5}, r"label_smoothing must lie in \[0, 0.5\), got 0.5"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "label_smoothing is for loss_type sigmoid and robust, not"),
        ({"loss_type": "ipo", "chosen_lengths": None}, "loss_type ipo is of means over tokens: it needs both lengths"),
    ],
)
def test_settings_that_make_no_loss_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dpo_loss(*summed(), **{"rejected_lengths": torch.ones(7), **settings})


def test_the_rpo_term_is_the_chosen_answers_nll_a_token() -> None:
    logps = torch.tensor([-6.0, -2.0, 0.0], requires_grad=True)
    term = rpo_term(logps, torch.tensor([3, 1, 0]))
    term.sum().backward()
    assert term.tolist() == [2.0, 2.0, 0.0]
    assert logps.grad.tolist() == pytest.approx([-1 / 3, -1.0, -1.0])


def test_sequence_logps_sums_what_is_not_masked() -> None:
    logps = torch.tensor([[-1.0, -2.0, -4.0], [math.nan, -math.inf, -8.0], [math.nan, math.nan, math.nan]])
    logps.requires_grad_()
    mask = torch.tensor([[1, 0, 1], [0, 0, 1], [0, 0, 0]])
    sums = sequence_logps(logps, mask)
    sums.sum().backward()
    assert sums.tolist() == [-5.0, -8.0, 0.0]
    assert logps.grad.tolist() == mask.tolist()


def mean_logps(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """From nearly certain to nearly impossible, on both sides of -ln 2."""
    chosen = -torch.tensor([1e-5, 0.3, 0.6931, 0.6932, 2.0, 30.0, 700.0, 0.01], dtype=dtype)
    return chosen, chosen.flip(0).clone()


@pytest.mark.parametrize("lambda_or", [0.1, 2.0])
def test_orpo_is_the_papers_loss_in_value_and_gradient(lambda_or: float) -> None:
    chosen, rejected = (logps.requires_grad_() for logps in mean_logps())
    nll = torch.rand(8, dtype=torch.float64).requires_grad_()
    loss, log_odds = orpo_loss(chosen, rejected, nll, lambda_or=lambda_or, num_items=50, num_pairs=16)
    loss.backward()
    pairs = [reference_preference.orpo_pair(chosen[i].item(), rejected[i].item(), lambda_or) for i in range(8)]
    assert loss.item() == pytest.approx(sum(nll.tolist()) / 50 + sum(pair.loss for pair in pairs) / 16, rel=1e-10)
    assert chosen.grad.tolist() == pytest.approx([pair.by_chosen / 16 for pair in pairs], rel=1e-10)
    assert rejected.grad.tolist() == pytest.approx([pair.by_rejected / 16 for pair in pairs], rel=1e-10)
    assert nll.grad.tolist() == pytest.approx([1 / 50] * 8)
    odds = [
        reference_preference.log_odds(c)[0] - reference_preference.log_odds(r)[0]
        for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)
    ]
    assert log_odds.tolist() == pytest.approx(odds, rel=1e-10)


def test_orpo_divides_by_its_own_pairs_unless_told_otherwise() -> None:
    chosen, rejected = mean_logps()
    nll = torch.ones(8, dtype=torch.float64)
    assert orpo_loss(chosen, rejected, nll)[0] == orpo_loss(chosen, rejected, nll, num_items=8, num_pairs=8)[0]


def test_log1mexp_keeps_its_digits_in_float32() -> None:
    """At every size, the error stays at a few roundings; either branch alone loses all digits on the other's side."""
    x = -torch.logspace(-6, 1.9, 200)
    far = [math.log1p(-math.exp(v)) if v < -1 else math.log(-math.expm1(v)) for v in x.tolist()]
    exact = torch.tensor(far, dtype=torch.float64)
    relative = ((log1mexp(x).double() - exact) / exact).abs()
    assert relative.max() < 4 * EPS
    naive = ((torch.log1p(-torch.exp(x)).double() - exact) / exact).abs()
    assert naive.max() > 1000 * EPS


def test_orpo_stays_finite_where_an_answer_is_certain_or_impossible() -> None:
    """0 is a probability of 1, and what a row without a token has; the gradient of both is bounded or 0."""
    chosen = torch.tensor([0.0, 0.0, -1e4, -1e-9, -1e4, 0.0]).requires_grad_()
    rejected = torch.tensor([0.0, -1e4, 0.0, -1.0, -1e4, -1e-9]).requires_grad_()
    loss, log_odds = orpo_loss(chosen, rejected, torch.zeros(6))
    loss.backward()
    for tensor in (loss, log_odds, chosen.grad, rejected.grad):
        assert tensor.isfinite().all()
    assert loss > 1


def test_a_negative_lambda_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lambda_or must not be negative, got -0\.1"):
        orpo_loss(*mean_logps(), torch.zeros(8), lambda_or=-0.1)
