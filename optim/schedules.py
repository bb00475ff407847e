"""Learning-rate schedules: a warm-up line, then constant, linear or cosine decay to zero.

    step s = 0 … S-1 of S, W warm-up steps, progress p = (s - W) / (S - W)

    s < W        peak · (s + 1) / (W + 1)
    constant     peak
    linear       peak · (1 - p)
    cosine       peak · (1 + cos πp) / 2          (SGDR, arXiv 1608.03983, eq. 5, one period, η_min = 0)

Warm-up starts above zero: a first step at rate 0, as in transformers' schedules, would learn nothing from its batch.
"""

import math

SCHEDULES = ("constant", "linear", "cosine")


def learning_rate(step: int, *, total_steps: int, peak: float, warmup_steps: int, schedule: str) -> float:
    """The rate of optimizer step `step`, counted from 0. Raises ValueError for an unknown schedule."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return peak * (1 - progress) if schedule == "linear" else peak * (1 + math.cos(math.pi * progress)) / 2
