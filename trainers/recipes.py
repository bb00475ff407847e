"""Defaults by method, each with where it comes from, and warnings about flags that seldom work.

| knob | full | LoRA, QLoRA | source |
|---|---|---|---|
| learning rate | 2e-5 | 2e-4 | TRL's SFT default; QLoRA (arXiv 2305.14314) for 7B and 13B, Unsloth's guide |
| r, alpha, targets | - | 16, 16, all linear layers | Unsloth's guide; QLoRA fig. 2 for the targets |
| dropout | - | 0 | Unsloth's guide (QLoRA used 0.1 up to 13B) |
| schedule, warm-up | cosine, 5% | cosine, 5% | Unsloth's guide (QLoRA: constant, 3%) |
| weight decay | 0.01 | 0.01 | torch.optim.AdamW, Unsloth's guide (QLoRA: 0) |
| clipping | 1.0 | 1.0 | transformers' default (QLoRA: 0.3) |
| rows an update | 16 | 16 | QLoRA's scripts |
| learning rate, DPO and ORPO | 1e-6 | 5e-6 | TRL's default; Unsloth's guide |

A flag given by the user always wins: a warning is a line at the start of the run and in its config.json, no more.

Two famous traps have no warning, since they cannot happen here. Padding with the EOS token hides it from a loss that
masks by token id, and the model never learns to stop: here masks come from lengths. A bf16 weight swallows updates
of less than half its last bit (0.2 to 0.4% of it): here what is trained is fp32, whatever the activations are.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

METHODS = ("full", "lora", "qlora")

LEARNING_RATE = {
    "sft": {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4},
    "dpo": {"full": 1e-6, "lora": 5e-6, "qlora": 5e-6},
    "orpo": {"full": 1e-6, "lora": 5e-6, "qlora": 5e-6},
    "distill": {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4},
    "grpo": {"full": 1e-6, "lora": 1e-5, "qlora": 1e-5},  # TRL's default; LoRA Without Regret's ten times as much
}
"""By trainer, then by method."""

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


def default_learning_rate(method: str, trainer: str = "sft") -> float:
    """The peak rate of `trainer` by `method`. Raises ValueError for another method."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return LEARNING_RATE[trainer][method]


@dataclass(frozen=True)
class Recipe:
    """A run before it starts, in the numbers that the warnings judge."""

    method: str
    learning_rate: float
    parameters: int
    """of the model, trained or not"""
    r: int
    scaling: float
    """what B·A·x is multiplied by"""
    use_rslora: bool
    targets: frozenset[str]
    """last names of the layers that have an adapter"""

    rows: int
    """of the data file"""
    truncated: int
    dropped: int
    examples: int
    """what is left to learn from"""
    longest: int
    """tokens of the longest example"""
    context: int
    """the model's max_position_embeddings"""

    steps: int
    warmup_ratio: float
    warmup_steps: int
    examples_per_update: float
    padding: float
    """share of padding in the batches"""
    packing: bool
    trainer: str = "sft"


def warnings(recipe: Recipe) -> list[str]:
    """What seldom works, one line each with its reason."""
    adapter = () if recipe.method == "full" else _about_the_adapter(recipe)
    return [*_about_the_rate(recipe), *adapter, *_about_the_data(recipe), *_about_the_steps(recipe)]


def _about_the_rate(recipe: Recipe) -> Iterator[str]:
    rate = f"learning rate {recipe.learning_rate:g}"
    if recipe.trainer in ("dpo", "orpo"):
        yield from _about_the_preference_rate(recipe, rate)
        return
    if recipe.method == "full":
        # a student that lost half of its layers learns at ten times that rate and more (benchmarks/bench_distill.py)
        if recipe.learning_rate >= 1e-4 and recipe.trainer != "distill":
            yield f"{rate} is one for adapters: full fine-tuning takes 1e-5 to 5e-5 (axolotl's guide), 2e-5 by default"
        return
    if recipe.learning_rate <= 5e-5:
        yield f"{rate} is one for full fine-tuning: LoRA takes about ten times as much (LoRA Without Regret), or 2e-4"
    # small models take more: the demo's, of 135M parameters, learns at 2e-3 (docs/log.md)
    limit = 5e-4 if recipe.parameters >= 1e9 else 5e-3
    if recipe.learning_rate > limit:
        yield f"{rate} is above {limit:g}: QLoRA and Unsloth take 2e-4 and less; larger rates tend to diverge"


def _about_the_preference_rate(recipe: Recipe, rate: str) -> Iterator[str]:
    if recipe.method == "full":
        if recipe.learning_rate >= 1e-5:
            yield f"{rate} is much for preferences in full: TRL takes 1e-6; larger rates make every answer unlikely"
        return
    limit = 5e-5 if recipe.parameters >= 1e9 else 1e-3  # small models take more: qlora demo dpo (docs/log.md)
    if recipe.learning_rate > limit:
        yield f"{rate} is above {limit:g}: Unsloth takes 5e-6 for preferences; larger rates make every answer unlikely"


def _about_the_adapter(recipe: Recipe) -> Iterator[str]:
    if not 0.25 <= recipe.scaling <= 4:
        formula = "alpha/√r" if recipe.use_rslora else "alpha/r"
        yield f"{formula} is {recipe.scaling:g}, outside 0.25 to 4: it acts on the update as the learning rate does"
    if recipe.r > 64 and not recipe.use_rslora:
        yield f"rank {recipe.r} with alpha/r: the update shrinks as r grows; --use-rslora (arXiv 2312.03732) mends that"
    if recipe.targets <= ATTENTION:
        yield "adapters on attention alone learn less than on all linear layers (QLoRA fig. 2, LoRA Without Regret)"


def _about_the_data(recipe: Recipe) -> Iterator[str]:
    if recipe.truncated > 0.05 * recipe.rows:
        share = recipe.truncated / recipe.rows
        yield f"{share:.0%} of the rows are cut at --max-seq-length: their answers have no end to learn; raise it"
    if recipe.dropped:
        yield f"{recipe.dropped:,} rows are left out: cut at --max-seq-length, nothing of them is left to learn"
    if recipe.longest > recipe.context:
        yield (
            f"the longest example has {recipe.longest:,} tokens, the model's context {recipe.context:,}: it has never "
            "seen the positions beyond; lower --max-seq-length"
        )
    if recipe.padding > 0.25 and not recipe.packing:
        yield f"{recipe.padding:.0%} of the batches is padding, computed in vain: try --packing or --group-by-length"


def _about_the_steps(recipe: Recipe) -> Iterator[str]:
    per_update = recipe.examples_per_update
    if (recipe.steps - 1) * per_update >= 3 * recipe.examples:  # the last update of three epochs may reach beyond them
        epochs = recipe.steps * per_update / recipe.examples
        yield f"every row is seen {epochs:.1f} times: 1 to 3 epochs are usual (Unsloth's guide), more learns by heart"
    if recipe.warmup_ratio > 0 and recipe.warmup_steps == 0:
        yield f"{recipe.warmup_ratio:.0%} of {recipe.steps} steps is no warm-up: the first update has the full rate"
    if per_update < 4:
        yield f"{per_update:.2g} examples an update make its direction noisy: 16 are usual (QLoRA), see --accumulation"
    if per_update > 64 and recipe.method != "full":
        yield f"{per_update:.0f} examples an update: LoRA loses by large batches, stay under 32 (LoRA Without Regret)"
    if recipe.examples < 10 * per_update:
        updates = f"{recipe.examples / per_update:.1f} updates of {per_update:.0f} examples"
        yield f"an epoch is {updates}, too few to learn much from: lower --accumulation or --batch-size"


HOLDS_CHOSEN = {
    "dpo": "a lower rate, a larger --beta, or --rpo-alpha 1 hold them",
    "orpo": "a lower rate or a smaller --lambda-or hold them",
}
"""By trainer: what keeps chosen answers from growing less likely."""


class PreferenceHealth:
    """What the numbers of a DPO or ORPO run say while it runs: means of its first ten steps against its last ten.

    The limits are ours. Each warning is said once, with flags that the trainer has.
    """

    STEPS = 10

    def __init__(self, trainer: str, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        """trainer: dpo or orpo. rows: of metrics.jsonl, where a run goes on."""
        self.trainer, self.rows = trainer, list(rows)
        self.said: set[str] = set()

    def new_warnings(self, row: Mapping[str, Any]) -> list[str]:
        """Takes the row of a step; every ten steps from the twentieth on, what is new."""
        self.rows.append(row)
        if len(self.rows) < 2 * self.STEPS or len(self.rows) % self.STEPS:
            return []
        found = {text.partition(":")[0].partition(" (")[0]: text for text in self._judge()}
        new = [text for what, text in found.items() if what not in self.said]
        self.said |= set(found)
        return new

    def _judge(self) -> Iterator[str]:
        first, last = self.rows[: self.STEPS], self.rows[-self.STEPS :]
        before, now = _mean(first, "logps/chosen"), _mean(last, "logps/chosen")
        if now < 1.25 * before:
            yield (
                f"chosen answers grow less likely (logps/chosen {before:.3g} at first, {now:.3g} now): the margin is "
                f"won by pushing rejected ones down; {HOLDS_CHOSEN[self.trainer]}"
            )
        if (accuracy := _mean(last, "rewards/accuracies")) < 0.6:
            yield (
                f"pairs are told apart hardly better than by chance (accuracy {accuracy:.0%}): raise --learning-rate, "
                "or see with `qlora inspect data` what sets the answers apart"
            )
        if self.trainer == "dpo" and (margin := _mean(last, "rewards/margins")) > 10:
            yield (
                f"the margin is far beyond what is needed (rewards/margins {margin:.1f}): the gradient has vanished, "
                "and the model is far from its reference; fewer --epochs, or a larger --beta"
            )


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """NaN where a row has none: metrics.jsonl has null for what was not finite."""
    return sum(math.nan if row.get(name) is None else row[name] for row in rows) / len(rows)
