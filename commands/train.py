"""qlora sft: run a trainer, then say where the results are."""

from trainers import sft
from trainers.run import RunResult
from trainers.sft import SFTConfig

__all__ = ["SFTConfig", "run", "say"]


def run(config: SFTConfig) -> None:
    say(sft.train(config).result)


def say(result: RunResult) -> None:
    """How a finished run went, in a line."""
    held_out = "" if result.eval_loss is None else f", {result.eval_loss:.4f} on held-out rows"
    print(
        f"{result.steps} steps in {result.seconds:.0f} s: loss {result.loss:.4f}{held_out}; "
        f"{result.tokens_per_second:,.0f} tokens/s, {result.peak_memory_bytes / 1e9:.2f} GB peak; see {result.out}"
    )
