"""What GRPO's numbers say: how micro-batches' become an update's, which curves are drawn, and which seldom end well.

Every number and its formula: docs/metrics.md.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

CURVES = {
    "reward": ({"reward": "rollouts", "eval_reward": "held out, greedy"}, "mean reward"),
    "kl": ({"kl": "KL to the model before training"}, "nats per token"),
    "length": ({"completions/mean_length": "mean", "completions/max_length": "longest"}, "tokens of a completion"),
    "clip": ({"clip_ratio/low": "below", "clip_ratio/high": "above"}, "share of tokens clipped"),
    "entropy": ({"entropy": "entropy"}, "nats per token"),
}
"""plots/NAME.png: the numbers drawn, each with its label, and the label of the y axis."""


def masked_mean(x: Tensor, mask: Tensor) -> float:
    """The mean over the counted places; 0 where there are none."""
    return float((x * mask).sum() / mask.sum().clamp(min=1))


def sampling_difference(logps: Tensor, sampling_logps: Tensor, completion_mask: Tensor) -> dict[str, float]:
    """How far the sampler's log-probabilities are from the training forward's of the same weights. All (B, T)."""
    mask = completion_mask != 0
    apart = (logps - sampling_logps).abs() * mask
    return {
        "sampling/logp_difference_mean": masked_mean(apart, mask),
        "sampling/logp_difference_max": float(apart.max()),
    }


def merged_metrics(parts: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """Of an update, from those of its micro-batches: means weighted by counted tokens, minima and maxima as such.

    None where no token counted.
    """
    total = sum(part["tokens"] for part in parts)
    if total == 0:
        return {key: None for key in parts[0] if key != "tokens"} | {"learnt_tokens": 0}
    merged: dict[str, float | None] = {}
    for key in parts[0]:
        values = [part[key] for part in parts]
        if key == "tokens":
            merged["learnt_tokens"] = total
        elif key.endswith("max"):
            merged[key] = max(values)
        elif key.endswith("min"):
            merged[key] = min(values)
        else:
            merged[key] = sum(part[key] * part["tokens"] for part in parts) / total
    return merged


def health(row: Mapping[str, Any], *, by_token: bool) -> Iterator[tuple[str, str]]:
    """What a row of metrics.jsonl shows that seldom ends well: (the number at fault, a line in plain words).

    The bounds are those of axolotl's guide to stable training. by_token: whether ratios are each token's own; sequences
    are clipped whole, and GSPO's paper, where about 15% are, means them to be.
    """
    if row["step"] >= 20 and _of(row, "reward", 1.0) < 0.15:
        yield "reward", "rewards are under 0.15 after 20 steps: too hard for this model, or wrong; see samples.jsonl"
    if _of(row, "frac_reward_zero_std") >= 0.8:
        yield "spread", "four of five groups have equal rewards and teach nothing: the task is too easy, or too hard"
    if _of(row, "completions/clipped_ratio") > 0.8:
        yield "cut", "four of five completions are cut at --max-completion-length: rewards judge answers without an end"
    if _of(row, "entropy", 1.0) < 0.05:
        yield "entropy", "the entropy is under 0.05: nothing new is tried; raise --temperature or lower the rate"
    if _of(row, "kl") > 2:
        yield "kl", "the KL to the model before training is above 2: it has gone far; lower the rate or raise --beta"
    clipped = _of(row, "clip_ratio/low") + _of(row, "clip_ratio/high")
    if by_token and clipped > 0.3:
        yield "clip", "over 30% of the tokens are clipped: make fewer --updates-per-rollout, or lower the rate"
    if not by_token and clipped > 0.5:
        epsilon = 2 * _of(row, "ratio/mean_abs_log")
        yield (
            "clip",
            f"over half of what was sampled is clipped and teaches nothing: --epsilon {epsilon:.1g} clips less",
        )
    if _of(row, "sampling/logp_difference_mean") > 0.05:
        yield "sampling", "the sampler's log-probabilities are 0.05 from the training forward's on average"


def _of(row: Mapping[str, Any], key: str, missing: float = 0.0) -> float:
    value = row.get(key)
    return missing if value is None else float(value)
