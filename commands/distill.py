"""qlora distill: run the trainer, then say how near the student came to its teacher."""

from pathlib import Path

from trainers import distill
from trainers.distill import DistillConfig
from trainers.metrics import read_metrics

from .train import result_of, say

__all__ = ["DistillConfig", "run"]


def run(config: DistillConfig) -> None:
    result = result_of(distill.train, config)
    if result is None:
        return
    last = read_metrics(Path(result.out) / "metrics.jsonl")[-1]
    kl, loss = last.get("eval_kl"), result.eval_loss
    held_out = "" if kl is None or loss is None else f"; held out: loss {loss:.4f}, KL to the teacher {kl:.4f}"
    say(result, held_out)
