"""qlora sft: run a trainer, then say where the results are. The other trainers' commands call it too."""

from collections.abc import Callable
from typing import Any

from trainers import sft, world
from trainers.run import RunResult, Trained
from trainers.sft import SFTConfig

__all__ = ["SFTConfig", "result_of", "run", "say"]


def run(config: SFTConfig) -> None:
    if result := result_of(sft.train, config):
        say(result)


def result_of(train: Callable[[Any], Trained], config: Any) -> RunResult | None:
    """Train, alone or as one of torchrun's processes; None for those that are not the first, which keep silent."""
    with world.joined():
        result, speaks = train(config).result, world.is_main()
    return result if speaks else None


def say(result: RunResult, held_out: str | None = None) -> None:
    """How a finished run went, in a line. held_out: what is said in place of the loss on held-out rows."""
    if held_out is None:
        held_out = "" if result.eval_loss is None else f", {result.eval_loss:.4f} on held-out rows"
    print(
        f"{result.steps} steps in {result.seconds:.0f} s: loss {result.loss:.4f}{held_out}; "
        f"{result.tokens_per_second:,.0f} tokens/s, {result.peak_memory_bytes / 1e9:.2f} GB peak; see {result.out}"
    )
