"""qlora orpo: learn from pairs of answers, then say where the results are."""

from trainers import orpo
from trainers.orpo import ORPOConfig

from .train import say

__all__ = ["ORPOConfig", "run"]


def run(config: ORPOConfig) -> None:
    say(orpo.train(config).result)
