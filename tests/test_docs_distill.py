"""docs/ on distillation: its numbers are computed again, and the fields that it names are the ones written."""

import json
import re
from pathlib import Path

import pytest
import torch

from kernels import TopK
from tests.small_teacher import config_for, make
from tests.test_docs import EQUATIONS, FORMATS, ROOT, assert_holds, assert_says, row, tables
from trainers import distill
from trainers.metrics import read_metrics

STUDENT, TEACHER = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])


def loss_and_slope(teacher: torch.Tensor | TopK, beta: float) -> tuple[float, str]:
    z = STUDENT.clone().requires_grad_()
    loss = distill.distill_loss(z, teacher, beta=beta)
    loss.backward()
    return loss.item(), "({:.4f}, {:.4f}, {:.4f})".format(*z.grad[0].tolist())


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
def test_the_example(beta: float) -> None:
    loss, slope = loss_and_slope(TEACHER, beta)
    assert_holds(EQUATIONS, row(beta, f"{loss:.4f}", slope))


def test_the_example_of_one_known_token() -> None:
    logps = torch.log_softmax(TEACHER, dim=1)[:, 2:]
    loss, slope = loss_and_slope(TopK(torch.tensor([[2]]), logps), 0)
    known = [logps.exp().item(), torch.softmax(STUDENT, dim=1)[0, 2].item()]
    for name, p in zip("TS", known, strict=True):
        assert_says(EQUATIONS, f"{name} = ({p:.4f}, {1 - p:.4f})")
    assert_says(EQUATIONS, f"for β = 0 D = {loss:.4f}", f"dz = {slope}")


def test_metrics_and_cache_fields(tmp_path: Path) -> None:
    """docs/metrics.md names every number that distillation alone writes; docs/formats.md every field of a cache."""
    made = make(tmp_path)
    config = config_for(made, tmp_path / "run", on_policy_fraction=0.5, max_steps=3)
    distill.train(config, quiet=True)
    (table,) = (t for t in tables(ROOT / "docs" / "metrics.md") if any("`eval_kl`" in cells[0] for cells in t))
    named = {cells[0].strip("`") for cells in table[1:]}
    written = {name for line in read_metrics(tmp_path / "run" / "metrics.jsonl") for name in line}
    assert named <= written
    shared = "step grad_norm learning_rate examples learnt_tokens padding tokens seconds tokens_per_second"
    assert written - named == set(f"{shared} peak_memory_bytes page_faults skipped paging".split())
    cached = config_for(made, tmp_path / "other", teacher_cache=str(tmp_path / "cache"), max_steps=1)
    distill.train(cached, quiet=True)
    section = FORMATS.read_text(encoding="utf-8").split("## A teacher's predictions")[1].split("\n## ")[0]
    assert set(json.loads((tmp_path / "cache" / "train.json").read_text())) <= set(re.findall(r"`(\w+)`", section))
