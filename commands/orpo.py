"""qlora orpo: learn from pairs of answers, then say where the results are."""

from trainers import orpo
from trainers.orpo import ORPOConfig

from .train import result_of, say

__all__ = ["ORPOConfig", "run"]


def run(config: ORPOConfig) -> None:
    if result := result_of(orpo.train, config):
        say(result)
