"""tests/reference.py itself, against PyTorch in float64: a wrong loop would let wrong code pass."""

import pytest
import torch
from torch.nn import functional as F

from tests import reference
from tests.accuracy import exact, leaf


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the rounding of float64 sums of some tens of terms."""
    torch.testing.assert_close(actual, expected, rtol=100 * torch.finfo(torch.float64).eps, atol=1e-14)


def random(*shape: int) -> torch.Tensor:
    return leaf(torch.randn(shape).double())


def test_lora_linear_and_its_gradients_are_what_autograd_finds() -> None:
    x, own, weight, A, B, bias, row_scale = (
        random(*shape) for shape in ((3, 5), (3, 5), (4, 5), (2, 5), (4, 2), (4,), (4,))
    )
    dy = torch.randn(3, 4).double()
    y = row_scale * (x @ weight.T + 0.7 * own @ A.T @ B.T) + bias
    y.backward(dy)
    terms = [reference.Term(A.tolist(), B.tolist(), 0.7, own.tolist())]
    given = (x.tolist(), weight.tolist(), terms)
    close(exact(reference.lora_linear(*given, bias.tolist(), row_scale.tolist())), y)
    g = reference.lora_linear_gradients(*given, row_scale.tolist(), dy.tolist())
    for actual, tensor in zip((g.x, g.bias, g.row_scale, *g.terms[0]), (x, bias, row_scale, A, B, own), strict=True):
        close(exact(actual), tensor.grad)


@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, 3.0)])
def test_token_cross_entropy_is_what_autograd_finds(temperature: float, softcap: float | None) -> None:
    logits = random(4, 9)
    shaped = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature
    nll = F.cross_entropy(shaped, torch.tensor([0, 8, -100, 3]), reduction="none")
    nll.sum().backward()
    entropy = torch.distributions.Categorical(logits=shaped).entropy()
    for row, target in enumerate([0, 8, -100, 3]):
        loss = reference.token_cross_entropy(logits[row].tolist(), target, temperature=temperature, softcap=softcap)
        close(exact(loss.nll), nll[row])
        close(exact(loss.gradient), logits.grad[row])
        close(exact(loss.entropy), entropy[row] * (target != -100))


def test_sft_loss_is_one_mean_over_all_learnt_tokens() -> None:
    assert reference.sft_loss([[1.0, 2.0, 9.0], [6.0, 9.0, 9.0]], [[1, 1, 0], [1, 0, 0]]) == 3.0
    assert reference.sft_loss([[1.0, 2.0]], [[1, 1]], num_items=6) == 0.5
    assert reference.sft_loss([[float("nan")]], [[0]]) == 0.0


def test_adamw_step_is_that_of_torch() -> None:
    parameter, options = random(6), {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}
    optimizer = torch.optim.AdamW([parameter], **options)
    state = reference.AdamWState(parameter.tolist(), [0.0] * 6, [0.0] * 6, 0)
    for _ in range(5):
        parameter.grad = torch.randn(6).double()
        optimizer.step()
        state = reference.adamw_step(state, parameter.grad.tolist(), **options)
        close(exact(state.param), parameter)
    close(exact(state.exp_avg_sq), optimizer.state[parameter]["exp_avg_sq"])


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clipping_is_that_of_torch(max_norm: float) -> None:
    a, b = random(4), random(3)
    a.grad, b.grad = torch.randn(4).double(), torch.randn(3).double()
    factor = reference.clip_coefficient([a.grad.tolist(), b.grad.tolist()], max_norm)
    expected = a.grad * factor
    torch.nn.utils.clip_grad_norm_([a, b], max_norm)
    torch.testing.assert_close(a.grad, expected, rtol=1e-5, atol=0)  # torch adds 1e-6 to the norm


def test_schedules_at_their_corners() -> None:
    def factors(schedule: str, *steps: int) -> list[float]:
        return [reference.learning_rate_factor(schedule, s, warmup_steps=4, total_steps=12) for s in steps]

    assert factors("linear", 0, 1, 4, 8, 12, 13) == [0.0, 0.25, 1.0, 0.5, 0.0, 0.0]
    assert factors("constant", 0, 2, 4, 12) == [0.0, 0.5, 1.0, 1.0]
    assert factors("cosine", 0, 2, 4, 8, 12) == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0])
    assert reference.learning_rate_factor("cosine", 0, warmup_steps=0, total_steps=0) == 1.0
