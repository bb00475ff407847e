"""The flags of `qlora dpo`, beside those of every trainer, and the rules of its loss's settings."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from lora.init import takes_from_weight

from .flags import require
from .pair_flags import PairFlags

LossType = Literal["sigmoid", "robust", "hinge", "ipo", "ipo_sum", "sigmoid_norm"]
LOSS_TYPES: tuple[LossType, ...] = get_args(LossType)
SMOOTHED = ("sigmoid", "robust")


@dataclass(frozen=True, kw_only=True)
class DPOConfig(PairFlags):
    """Direct preference optimisation: learn from pairs of answers, against a reference model."""

    TRAINER: ClassVar[str] = "dpo"

    beta: float = 0.1
    """How strongly the model is held to the reference; 0.1 to 0.5 are usual."""
    loss_type: LossType = "sigmoid"
    """sigmoid (DPO), robust, hinge, ipo (of means over tokens), ipo_sum (as in its paper), sigmoid_norm (of means)."""
    label_smoothing: float = 0.0
    """Share of the labels that is taken to be wrong: with sigmoid this is cDPO, with robust robust DPO."""
    rpo_alpha: float = 0.0
    """RPO: add this times the chosen answer's negative log-likelihood a token, which keeps it from becoming rarer."""
    precompute_ref: bool = False
    """Compute the reference's log-probabilities once, before training, and keep them in the run's folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        moved = self.method != "full" and takes_from_weight(self.init)
        require(
            not moved, f"--init {self.init} changes the base, so that the adapter off is no reference: take kaiming"
        )
        check_dpo(self.beta, self.loss_type, self.label_smoothing)
        require(0 <= self.rpo_alpha < float("inf"), f"--rpo-alpha must not be negative, got {self.rpo_alpha}")


def check_dpo(beta: float, loss_type: str, label_smoothing: float) -> None:
    """Raises ValueError for settings that make no loss."""
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}")
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be above 0, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")
    if label_smoothing and loss_type not in SMOOTHED:
        raise ValueError(f"label_smoothing is for loss_type {' and '.join(SMOOTHED)}, not for {loss_type}")
