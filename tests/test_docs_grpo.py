"""docs/equations.md and docs/metrics.md, of GRPO: numbers in tables are computed again, the metrics named exist."""

import re
from dataclasses import replace
from pathlib import Path

import torch

from tests.small_base import write_base, write_rows
from tests.test_docs import EQUATIONS, ROOT, assert_holds, row
from trainers import grpo
from trainers.grpo import group_advantages, grpo_loss
from trainers.metrics import read_metrics


def test_the_advantages_in_the_table() -> None:
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 1])
    assert_holds(EQUATIONS, row("rewards", *rewards.int().tolist()))
    for scale in ("group", "batch", "none"):
        found = group_advantages(rewards, 4, scale=scale, eps=0.0 if scale == "group" else 1e-4)
        assert_holds(EQUATIONS, row(scale, *(f"{a:.3f}" for a in found.tolist())))


def test_the_losses_and_slopes_in_the_table() -> None:
    for ratio, A in ((1.0, 1), (1.1, 1), (1.5, 1), (0.5, 1), (1.5, -1), (0.5, -1)):
        logps = torch.tensor([[ratio]]).log().requires_grad_()
        loss, _ = grpo_loss(logps, torch.zeros(1, 1), torch.tensor([float(A)]), torch.ones(1, 1))
        loss.backward()
        slope = logps.grad.item() + 0.0
        assert_holds(EQUATIONS, row(ratio, A, f"{loss.item():.3f}", f"{slope:.3f}"))


def test_every_metric_that_a_run_writes_is_explained(tmp_path: Path) -> None:
    base, data = write_base(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl")
    config = grpo.GRPOConfig(
        data=str(data), eval_data=str(data), out=str(tmp_path / "run"), model=str(base), rewards=["exact"],
        batch_size=4, accumulation=1, num_generations=4, max_completion_length=4, max_steps=1, beta=0.1,
    )  # fmt: skip
    grpo.train(config, quiet=True)
    config = replace(config, out=str(tmp_path / "more"), beta=0.0, updates_per_rollout=2)
    grpo.train(config, quiet=True)
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    section = page.partition("## GRPO and GSPO")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([\w/]+)`", section))
    named |= {f"{group}/{name}" for group in ("completions", "ratio", "sampling") for name in named}
    named |= {"sampling/logp_difference_max"}
    common = {
        "step",
        "learning_rate",
        "tokens",
        "tokens_per_second",
        "peak_memory_bytes",
        "page_faults",
        "skipped",
        "paging",
    }
    for folder in ("run", "more"):
        for line in read_metrics(tmp_path / folder / "metrics.jsonl"):
            keys = {key.removeprefix("eval_").replace("/exact/", "/NAME/") for key in line}
            assert not keys - named - common
