"""trainers/distill.distill_loss against float64 loops: value and gradient, for every beta, temperature, kind of row."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import TopK
from kernels.divergence import divergence_and_slope, spread, student_outcomes, teacher_outcomes
from tests import reference
from tests.accuracy import assert_as_accurate_as, exact, leaf
from trainers.distill import distill_loss

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
M, V = 24, 33


def logits(scale: float = 2.0) -> tuple[Tensor, Tensor]:
    return leaf(scale * torch.randn(M, V)), scale * torch.randn(M, V)


def by_loops(student: Tensor, teacher: Tensor, *, outcomes: list | None = None, **options) -> tuple[Tensor, Tensor]:
    """(values, gradients of their sum), float64."""
    groups = outcomes or [None] * len(student)
    rows = [
        reference.distillation(s, t, outcomes=g, **options)
        for s, t, g in zip(student.tolist(), teacher.tolist(), groups, strict=True)
    ]
    return exact([row.value for row in rows]), exact([row.gradient for row in rows])


def top_k(teacher: Tensor, k: int, temperature: float = 1.0) -> tuple[TopK, list[list[list[int]]]]:
    """The teacher's k likeliest, and what counts as one outcome: each of them, and all others together."""
    values, ids = torch.topk(torch.log_softmax(teacher / temperature, dim=1), k, dim=1)
    groups = []
    for row in ids.tolist():
        rest = [v for v in range(teacher.shape[1]) if v not in row]
        groups.append([[v] for v in row] + ([rest] if rest else []))
    return TopK(ids.int(), values), groups


def plain(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """The same in PyTorch's own words."""
    s, t = (torch.log_softmax(z / temperature, dim=1) for z in (student, teacher))
    if beta == 0:
        return kl(t, s)
    if beta == 1:
        return kl(s, t)
    m = torch.log(beta * t.exp() + (1 - beta) * s.exp())
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return F.kl_div(q, p, reduction="none", log_target=True).sum(dim=1)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_value_and_gradient(beta: float, temperature: float) -> None:
    student, teacher = logits()
    same = leaf(student)
    loss = distill_loss(student, teacher, beta=beta, temperature=temperature)
    loss.sum().backward()
    loss_plain = plain(same, teacher, beta, temperature)
    loss_plain.sum().backward()
    values, gradients = by_loops(student, teacher, beta=beta, temperature=temperature)
    assert loss.shape == (M,)
    assert_as_accurate_as(loss_plain, loss, values)
    assert_as_accurate_as(same.grad, student.grad, gradients)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("k", [1, 5, V - 1])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_and_one_outcome_for_the_rest(beta: float, k: int, temperature: float) -> None:
    """In float64: what is left of the teacher's 1 comes from a difference."""
    student, teacher = (leaf(z.double()) for z in logits())
    top, groups = top_k(teacher.detach(), k, temperature)
    loss = distill_loss(student, top, beta=beta, temperature=temperature)
    loss.sum().backward()
    values, gradients = by_loops(student, teacher, outcomes=groups, beta=beta, temperature=temperature)
    tolerance = {"rtol": 1e4 * torch.finfo(torch.float64).eps, "atol": 1e4 * torch.finfo(torch.float64).eps}
    torch.testing.assert_close(loss, values, **tolerance)
    torch.testing.assert_close(student.grad, gradients, **tolerance)


@pytest.mark.parametrize("beta", BETAS)
def test_all_tokens_as_top_k_are_the_whole_distribution(beta: float) -> None:
    student, teacher = logits()
    top, _ = top_k(teacher, V)
    torch.testing.assert_close(distill_loss(student, top, beta=beta), distill_loss(student, teacher, beta=beta))


@pytest.mark.parametrize("beta", BETAS)
def test_more_tokens_of_the_teacher_tell_more_and_never_more_than_all(beta: float) -> None:
    student, teacher = (z.double() for z in logits())
    told = [distill_loss(student, top_k(teacher, k)[0], beta=beta) for k in (1, 4, 16, 32)]
    told.append(distill_loss(student, teacher, beta=beta))
    for fewer, more in pairwise(told):
        assert (fewer <= more + 1e-12).all()
        assert (fewer < more).any()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("k", [None, 3])
def test_it_is_zero_where_both_agree_and_has_no_slope_there(beta: float, k: int | None) -> None:
    student, _ = logits()
    teacher = student.detach() + 5.0  # softmax does not see a constant
    loss = distill_loss(student, teacher if k is None else top_k(teacher, k)[0], beta=beta)
    loss.sum().backward()
    assert loss.abs().max() < 8 * torch.finfo(torch.float32).eps
    assert student.grad.abs().max() < 8 * torch.finfo(torch.float32).eps


def test_half_and_half_is_symmetric_and_the_ends_are_not() -> None:
    student, teacher = logits()
    torch.testing.assert_close(distill_loss(student, teacher), distill_loss(teacher, student))
    ends = {beta: distill_loss(student, teacher, beta=beta) for beta in (0.0, 1.0)}
    torch.testing.assert_close(ends[0.0], distill_loss(teacher, student, beta=1.0))
    assert (ends[0.0] - ends[1.0]).abs().min() > 0.01


def test_it_jumps_at_the_ends_and_over_beta_it_is_the_forward_kl() -> None:
    student, teacher = (z.double() for z in logits())
    near = distill_loss(student, teacher, beta=1e-6)
    assert near.max() < 1e-4 < distill_loss(student, teacher, beta=0.0).min()
    torch.testing.assert_close(near / 1e-6, distill_loss(student, teacher, beta=0.0), rtol=1e-3, atol=0)


EXTREME = {
    "huge": (torch.tensor([[1e4, -1e4, 0.0, 3.0]]), torch.tensor([[-1e4, 1e4, 1.0, 0.0]])),
    "one token is certain": (torch.tensor([[200.0, 0.0, 0.0, 0.0]]), torch.tensor([[200.0, 0.0, -300.0, 0.0]])),
    "all equal": (torch.zeros(1, 4), torch.zeros(1, 4)),
    "a single token": (torch.tensor([[7.0]]), torch.tensor([[-7.0]])),
}


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", EXTREME)
def test_extreme_logits_are_no_nan(name: str, beta: float) -> None:
    student, teacher = leaf(EXTREME[name][0]), EXTREME[name][1]
    loss = distill_loss(student, teacher, beta=beta)
    loss.sum().backward()
    values, gradients = by_loops(student, teacher, beta=beta)
    torch.testing.assert_close(loss.double(), values, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(student.grad.double(), gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("k", [1, 2])
def test_a_teacher_that_leaves_nothing_for_the_rest_is_no_nan(beta: float, k: int) -> None:
    student = leaf(torch.tensor([[1.0, 2.0, 3.0, -80.0]]))
    top = TopK(torch.tensor([[0, 2]])[:, :k], torch.tensor([[0.0, -150.0]])[:, :k])
    loss = distill_loss(student, top, beta=beta)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad.isfinite().all()
    if beta == 0:
        assert loss.item() == pytest.approx(-torch.log_softmax(student, dim=1)[0, 0].item(), rel=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_a_token_that_neither_can_say_costs_nothing(beta: float) -> None:
    """-inf in both: as if the token were not in the vocabulary."""
    student, teacher = logits()
    masked = [z.detach().clone() for z in (student, teacher)]
    for z in masked:
        z[:, 7] = -math.inf
    kept = [v for v in range(V) if v != 7]
    held = leaf(masked[0])
    loss = distill_loss(held, masked[1], beta=beta)
    loss.sum().backward()
    torch.testing.assert_close(loss, distill_loss(student[:, kept], teacher[:, kept], beta=beta))
    assert held.grad.isfinite().all()
    assert held.grad[:, 7].abs().max() == 0


@pytest.mark.parametrize("beta", BETAS)
def test_a_token_that_the_teacher_alone_cannot_say_is_finite_unless_the_kl_is_not(beta: float) -> None:
    student, teacher = logits()
    teacher[:, 7] = -math.inf
    loss = distill_loss(student, teacher, beta=beta)
    loss.sum().backward()
    assert not student.grad.isnan().any()
    assert bool((loss > 1e30).all()) == (beta == 1.0)  # KL(S ‖ T) is infinite there, the others are not


@pytest.mark.parametrize("beta", BETAS)
def test_no_rows_cost_nothing(beta: float) -> None:
    student = leaf(torch.zeros(0, V))
    loss = distill_loss(student, torch.zeros(0, V), beta=beta)
    assert loss.shape == (0,)
    loss.sum().backward()
    assert student.grad.shape == (0, V)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("k", [None, 3, V])
def test_the_closed_form_of_the_slope_is_what_autograd_finds(beta: float, k: int | None) -> None:
    """What kernels/linear_distill.py uses, in float64."""
    student, teacher = (leaf(z.double()) for z in logits())
    s, t = torch.log_softmax(student, dim=1), torch.log_softmax(teacher.detach(), dim=1)
    top = None if k is None else top_k(teacher.detach(), k)[0]
    distill_loss(student, teacher if top is None else top, beta=beta).sum().backward()
    if top is None:
        value, slope = divergence_and_slope(s.detach(), t, beta)
    else:
        ids = top.ids.long()
        outcomes = student_outcomes(s.detach(), ids)
        value, slope = divergence_and_slope(outcomes, teacher_outcomes(top.logps, V), beta)
        slope = spread(slope, s.detach(), ids)
    torch.testing.assert_close(value, distill_loss(student, teacher if top is None else top, beta=beta))
    torch.testing.assert_close(slope, student.grad, rtol=1e-9, atol=1e-12)


def test_bf16_logits_are_compared_in_fp32() -> None:
    student, teacher = (z.detach().bfloat16() for z in logits())
    loss = distill_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, distill_loss(student.float(), teacher.float()))


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        ((2, 5), (2, 6), {}, r"logits of one shape \(M, V\), got \(2, 5\) and \(2, 6\)"),
        ((2, 5), (2, 5), {"beta": 1.5}, r"beta must lie in \[0, 1\], got 1.5"),
        ((2, 5), (2, 5), {"beta": float("nan")}, r"beta must lie in \[0, 1\], got nan"),
        ((2, 5), (2, 5), {"temperature": 0.0}, "temperature must be positive, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(student: tuple, teacher: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distill_loss(torch.randn(student), torch.randn(teacher), **options)


def test_a_top_k_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ids and logps \(2, k\), got \(2, 3\) and \(2, 4\)"):
        distill_loss(torch.randn(2, 5), (torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 4)))
