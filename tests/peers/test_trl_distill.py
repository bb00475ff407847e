"""Distillation against TRL, really run: its GKD loss, and its sparse loss with one outcome for the rest.

TRL has no top-k in GKDTrainer. The divergence over a teacher's k tokens and a tail bucket is in its
ServerDistillationTrainer, whose functions are called here; its KL is per outcome, ours is their sum.
"""

import os

import pytest
import torch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # it warns at import, and warnings are errors here
from trl.experimental.gkd import GKDTrainer
from trl.experimental.server_distillation import server_distillation_trainer as sparse

from kernels import linear_distill, linear_top_k
from tests.accuracy import leaf
from trainers.distill import distill_loss

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
B, T, V, D = 3, 7, 29, 8
CLOSE = {"rtol": 64 * torch.finfo(torch.float32).eps, "atol": 64 * torch.finfo(torch.float32).eps}


def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of both (B, T, V), labels (B, T) with masked tokens and a masked row."""
    labels = torch.randint(V, (B, T))
    labels[torch.rand(B, T) < 0.4] = -100
    labels[2] = -100
    return 2 * torch.randn(B, T, V), 2 * torch.randn(B, T, V), labels


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("num_items", [None, 40])
def test_gkd(beta: float, temperature: float, num_items: int | None) -> None:
    """Loss and gradient of a batch, over its own tokens and over a window's."""
    student, teacher, labels = case()
    ours, theirs, mask = leaf(student), leaf(student), labels != -100
    wanted = GKDTrainer.generalized_jsd_loss(theirs, teacher, labels, beta, temperature, num_items_in_batch=num_items)
    wanted.backward()
    rows = distill_loss(ours[mask], teacher[mask], beta=beta, temperature=temperature)
    loss = rows.sum() / (num_items or int(mask.sum()))
    loss.backward()
    torch.testing.assert_close(loss, wanted, **CLOSE)
    torch.testing.assert_close(ours.grad, theirs.grad, **CLOSE)


@pytest.mark.parametrize("beta", BETAS)
def test_gkd_from_hidden_states(beta: float) -> None:
    student, teacher = torch.randn(B * T, D), torch.randn(B * T, D)
    heads = torch.randn(V, D), torch.randn(V, D)
    ours, theirs = leaf(student), leaf(student)
    wanted = GKDTrainer.generalized_jsd_loss(theirs @ heads[0].T, teacher @ heads[1].T, beta=beta, reduction="sum")
    wanted.backward()
    loss = linear_distill(ours, heads[0], teacher, heads[1], beta=beta).loss.sum()
    loss.backward()
    torch.testing.assert_close(loss, wanted, **CLOSE)
    torch.testing.assert_close(ours.grad, theirs.grad, **CLOSE)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("k", [1, 4])
def test_top_k_with_a_tail(beta: float, k: int) -> None:
    student, teacher, heads = torch.randn(B * T, D), torch.randn(B * T, D), (torch.randn(V, D), torch.randn(V, D))
    top = linear_top_k(teacher, heads[1], k)
    ours, theirs = leaf(student), leaf(student)
    logps = torch.log_softmax(theirs @ heads[0].T, dim=1).gather(1, top.ids.long())
    valid = torch.ones_like(top.logps, dtype=torch.bool)
    s, mask = sparse._add_tail_bucket(logps, valid)
    t, _ = sparse._add_tail_bucket(top.logps, valid)
    wanted = sparse._jsd_divergence(s, t, beta, mask).sum()
    wanted.backward()
    loss = linear_distill(ours, heads[0], top, beta=beta).loss.sum()
    loss.backward()
    torch.testing.assert_close(loss, wanted, **CLOSE)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=CLOSE["rtol"], atol=1e-4)
