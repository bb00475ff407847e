"""qlora distill: run the trainer, then say how near the student came to its teacher."""

from pathlib import Path

from trainers import distill
from trainers.distill import DistillConfig
from trainers.metrics import read_metrics

__all__ = ["DistillConfig", "run"]


def run(config: DistillConfig) -> None:
    result = distill.train(config).result
    last = read_metrics(Path(result.out) / "metrics.jsonl")[-1]
    kl, loss = last.get("eval_kl"), result.eval_loss
    held_out = "" if kl is None or loss is None else f"; held out: loss {loss:.4f}, KL to the teacher {kl:.4f}"
    print(
        f"{result.steps} steps in {result.seconds:.0f} s: loss {result.loss:.4f}{held_out}; "
        f"{result.tokens_per_second:,.0f} tokens/s, {result.peak_memory_bytes / 1e9:.2f} GB peak; see {result.out}"
    )
