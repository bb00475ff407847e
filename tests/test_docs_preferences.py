"""What docs/equations.md and docs/metrics.md say of DPO and ORPO: the numbers recomputed, every metric explained."""

import json
import re
from pathlib import Path

import pytest
import torch

from tests.pair_rows import PAIRS
from tests.small_base import write_base, write_rows
from tests.test_docs import EQUATIONS, FORMATS, ROOT, assert_holds, documented_fields, row, text
from trainers import dpo, orpo

METRICS = ROOT / "docs" / "metrics.md"
MARGINS = (-4, -1, 0, 1, 4)


def test_losses_and_pulls_of_dpo() -> None:
    margins = torch.tensor([float(margin) for margin in MARGINS], requires_grad=True)
    zeros = torch.zeros(5)
    losses, *_ = dpo.dpo_loss(margins, zeros, zeros, zeros, beta=1.0)
    losses.sum().backward()
    assert_holds(EQUATIONS, row("margin", *MARGINS))
    assert_holds(EQUATIONS, row("loss", *(f"{loss:.3f}" for loss in losses.tolist())))
    assert_holds(EQUATIONS, row("pull", *(f"{-pull:.3f}" for pull in margins.grad.tolist())))


@pytest.mark.parametrize("p", [0.05, 0.20, 0.50, 0.90])
def test_odds_ratios_of_orpo(p: float) -> None:
    logps = torch.tensor([[p], [0.2]], dtype=torch.float64).log()
    loss, log_odds = orpo.orpo_loss(logps[0], logps[1], torch.zeros(1), lambda_or=1.0)
    assert_holds(EQUATIONS, row(f"{p:.2f}", f"{p / (1 - p):.3f}", f"{log_odds.item():.3f}", f"{loss.item():.3f}"))


def test_every_metric_of_a_run_is_explained(tmp_path: Path) -> None:
    base, data = write_base(tmp_path / "base"), write_rows(tmp_path / "pairs.jsonl", PAIRS)
    flags = {"data": str(data), "model": str(base), "eval_fraction": 0.25, "max_steps": 1, "samples": 0, "threads": 1}
    dpo.train(dpo.DPOConfig(out=str(tmp_path / "dpo"), rpo_alpha=1.0, **flags), quiet=True)
    orpo.train(orpo.ORPOConfig(out=str(tmp_path / "orpo"), **flags), quiet=True)
    explained = set(re.findall(r"^\| `([\w/]+)`", text(METRICS), re.MULTILINE))
    of_every_run = documented_fields("field of metrics.jsonl")
    written = set()
    for run in ("dpo", "orpo"):
        (line,) = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        written |= {name.removeprefix("eval_") for name in json.loads(line)}
    assert written - of_every_run <= explained
    preferences = text(METRICS).partition("## Preferences")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([\w/]+)`", preferences, re.MULTILINE)) <= written
    assert "reference.safetensors" in text(FORMATS)
