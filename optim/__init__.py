"""optim: what moves the parameters. This version has schedules and parameter groups; torch.optim.AdamW steps."""

from .groups import decay_groups
from .schedules import SCHEDULES, learning_rate

__all__ = ["SCHEDULES", "decay_groups", "learning_rate"]
