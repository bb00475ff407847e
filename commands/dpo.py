"""qlora dpo: learn from pairs of answers, then say where the results are."""

from trainers import dpo
from trainers.dpo import DPOConfig

from .train import result_of, say

__all__ = ["DPOConfig", "run"]


def run(config: DPOConfig) -> None:
    if result := result_of(dpo.train, config):
        say(result)
