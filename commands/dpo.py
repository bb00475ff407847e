"""qlora dpo: learn from pairs of answers, then say where the results are."""

from trainers import dpo
from trainers.dpo import DPOConfig

from .train import say

__all__ = ["DPOConfig", "run"]


def run(config: DPOConfig) -> None:
    say(dpo.train(config).result)
