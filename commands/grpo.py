"""qlora grpo: train by rewards, then say what they were before and after."""

from pathlib import Path

from trainers import grpo
from trainers.grpo_config import GRPOConfig
from trainers.metrics import read_metrics

from .train import result_of

__all__ = ["GRPOConfig", "run"]


def run(config: GRPOConfig) -> None:
    result = result_of(grpo.train, config)
    if result is None:
        return
    print(f"{result.steps} steps in {result.seconds:.0f} s, {result.peak_memory_bytes / 1e9:.2f} GB peak")
    rows = read_metrics(Path(config.out) / "metrics.jsonl")
    for key, who in (("reward", "rollouts"), ("eval_reward", "held-out prompts, greedy")):
        known = [row[key] for row in rows if row.get(key) is not None]
        if known:
            print(f"mean reward of {who}: {known[0]:.3f} at the start, {known[-1]:.3f} at the end")
    print(f"see {result.out}")
