"""qlora grpo: train by rewards, then say what they were before and after, and show it on two held-out prompts."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from trainers import grpo
from trainers.grpo_config import GRPOConfig
from trainers.metrics import read_metrics

from .train import result_of

__all__ = ["GRPOConfig", "run"]

SHOWN = 2


def run(config: GRPOConfig) -> None:
    result = result_of(grpo.train, config)
    if result is None:
        return
    print(f"{result.steps} steps in {result.seconds:.0f} s, {result.peak_memory_bytes / 1e9:.2f} GB peak")
    rows = read_metrics(Path(config.out) / "metrics.jsonl")
    told = {"reward": "rollouts", "eval_reward": "held-out prompts, greedy"}
    if len(config.reward_names) > 1:
        told |= {f"eval_rewards/{name}/mean": f"held-out prompts, {name} alone" for name in config.reward_names}
    for key, who in told.items():
        known = [row[key] for row in rows if row.get(key) is not None]
        if known:
            print(f"mean reward of {who}: {known[0]:.3f} before, {known[-1]:.3f} after")
    for line in examples(read_metrics(Path(config.out) / "samples.jsonl"), SHOWN):
        print(line)
    print(f"see {result.out}")


def examples(samples: Sequence[dict[str, Any]], count: int) -> Iterator[str]:
    """The first held-out prompts of samples.jsonl, each with its answers before training and at the end."""
    held_out = [row for row in samples if row["advantage"] is None]
    steps = [row["step"] for row in held_out]
    before, after = (
        [row for row in held_out if row["step"] == step] for step in (min(steps, default=0), max(steps, default=0))
    )
    for first, last in islice(zip(before, after, strict=False), count):
        yield f"{first['prompt'][-1]['content']}  (wanted: {first['wanted']})"
        yield f"  before: {' '.join(first['completion'].split())}"
        yield f"  after:  {' '.join(last['completion'].split())}"
