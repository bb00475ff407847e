"""The flags of `qlora orpo`, beside those of every trainer."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from .flags import require, require_one_of
from .pair_flags import PairFlags

NLL = Literal["answer", "all"]


@dataclass(frozen=True, kw_only=True)
class ORPOConfig(PairFlags):
    """Odds ratio preference optimisation: fine-tuning and preference in one loss, without a reference model."""

    TRAINER: ClassVar[str] = "orpo"

    lambda_or: float = 0.1
    """Weight of the odds ratio beside the likelihood of the chosen answer (λ; `beta` in TRL)."""
    nll: NLL = "answer"
    """Whose likelihood: that of the chosen answer, or of its prompt too (all, as in TRL and the authors' code)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.lambda_or < float("inf"), f"--lambda-or must not be negative, got {self.lambda_or}")
        require_one_of("nll", self.nll, get_args(NLL))
