"""qlora sft: run a trainer, then say where the results are."""

from trainers import sft, world
from trainers.sft import SFTConfig

__all__ = ["SFTConfig", "run"]


def run(config: SFTConfig) -> None:
    with world.joined():
        result, speaks = sft.train(config).result, world.is_main()
    held_out = "" if result.eval_loss is None else f", {result.eval_loss:.4f} on held-out rows"
    if speaks:
        print(
            f"{result.steps} steps in {result.seconds:.0f} s: loss {result.loss:.4f}{held_out}; "
            f"{result.tokens_per_second:,.0f} tokens/s, {result.peak_memory_bytes / 1e9:.2f} GB peak; see {result.out}"
        )
