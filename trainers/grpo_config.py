"""The flags of `qlora grpo`, the recipes behind them, and what seldom works.

| recipe | loss | ratio of a | ε, ε_high | scale of advantages | β | besides | source |
|---|---|---|---|---|---|---|---|
| grpo | grpo | token | 0.2, 0.2 | group | 0.04 | - | arXiv 2402.03300 |
| dapo | dapo | token | 0.2, 0.28 | group | 0 | dynamic sampling, cut answers masked, overlong punished | 2503.14476 |
| dr_grpo | dr_grpo | token | 0.2, 0.2 | none | 0 | - | 2503.20783 |
| gspo | grpo | sequence | 3e-4, 4e-4 | group | 0 | 4 updates from a batch of rollouts | 2507.18071 |

A recipe fills in the flags that are not given; one that is given wins, and where the outcome is known not to be the
method that the recipe is named for, a warning says so. DAPO punishes the last fifth of the longest completion, as in
the paper (4,096 of 20,480 tokens).

Rows need an answer, since most rewards compare with it; where yours does not, repeat the question:
`--template "{prompt} => {prompt}"`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from data.flags import DataFlags

from .flags import TrainerFlags, flag, require, require_one_of

LossType = Literal["dapo", "grpo", "bnpo", "dr_grpo"]
Level = Literal["token", "sequence", "sequence_token"]
Scale = Literal["group", "batch", "none"]

PLAIN: dict[str, Any] = {
    "loss_type": "grpo",
    "importance_sampling_level": "token",
    "epsilon": 0.2,
    "epsilon_high": 0.2,
    "scale_rewards": "group",
    "beta": 0.0,
    "mask_truncated": False,
    "dynamic_sampling": False,
    "updates_per_rollout": 1,
}
RECIPES: dict[str, dict[str, Any]] = {
    "grpo": PLAIN | {"beta": 0.04},
    "dapo": PLAIN | {"loss_type": "dapo", "epsilon_high": 0.28, "mask_truncated": True, "dynamic_sampling": True},
    "dr_grpo": PLAIN | {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "gspo": PLAIN
    | {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4, "updates_per_rollout": 4},
}


@dataclass(frozen=True)
class Objective:
    """The flags that a recipe may fill in, filled in."""

    loss_type: LossType
    importance_sampling_level: Level
    epsilon: float
    epsilon_high: float
    scale_rewards: Scale
    beta: float
    mask_truncated: bool
    dynamic_sampling: bool
    updates_per_rollout: int


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(DataFlags, TrainerFlags):
    """Reinforcement by groups: GRPO, DAPO, Dr. GRPO, GSPO."""

    TRAINER: ClassVar[str] = "grpo"

    rewards: list[str]
    """What a completion is worth: exact, number, json, json_fields, regex:…, length:N, overlong:N, module:function."""
    reward_weights: list[float] = field(default_factory=list)
    """One for each of --rewards; 1 by default."""
    recipe: Literal["grpo", "dapo", "dr_grpo", "gspo"] = "grpo"
    """Fills in the flags below whose default is "by the recipe"."""

    loss_type: LossType | None = None
    """How tokens become one loss: by the recipe."""
    importance_sampling_level: Level | None = None
    """Whose probability ratio is clipped: by the recipe."""
    epsilon: float | None = None
    """Clip a ratio below 1 - ε: by the recipe."""
    epsilon_high: float | None = None
    """And above 1 + ε_high: by the recipe, or as --epsilon where that alone is given."""
    delta: float | None = None
    """Bound the ratio itself too, where the advantage is negative; off by default."""
    scale_rewards: Scale | None = None
    """Divide advantages by the standard deviation of the group, the batch, or nothing: by the recipe."""
    beta: float | None = None
    """Weight of the KL to the model before training: by the recipe."""
    mask_truncated: bool | None = None
    """Leave completions that were cut at --max-completion-length out of the loss: by the recipe."""
    dynamic_sampling: bool | None = None
    """Replace groups whose rewards are all equal: by the recipe."""
    max_resamples: int = 4
    """Further rounds of --dynamic-sampling; then the batch is filled up with groups without spread."""
    updates_per_rollout: int | None = None
    """Updates made from one batch of rollouts: by the recipe."""
    passes: int = 1
    """How many of these updates each completion is used in; each update takes passes / updates of the batch."""

    num_generations: int = 8
    """Completions of a prompt: a group."""
    max_completion_length: int = 256
    """Tokens of the longest completion."""
    temperature: float = 1.0
    """Of sampling; log-probabilities in the loss are of the same temperature."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that reach this much probability; 1 from all, as the ratios assume."""
    top_k: int = 0
    """Sample from this many of the likeliest tokens; 0 from all, as the ratios assume."""

    batch_size: int = 8
    """Completions in one forward."""
    accumulation: int = 8
    """Forwards in one update: batch_size · accumulation completions, whole groups."""
    samples: int = 8
    """Completions of each batch of rollouts, and of each evaluation, that are kept in samples.jsonl."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_generations", "max_completion_length", "passes"):
            require(getattr(self, name) >= 1, f"--{flag(name)} must be at least 1, got {getattr(self, name)}")
        require(self.max_resamples >= 0, f"--max-resamples must not be negative, got {self.max_resamples}")
        require(self.temperature > 0, f"--temperature must be above 0, got {self.temperature}: a group must differ")
        require_one_of("recipe", self.recipe, tuple(RECIPES))
        G, window = self.num_generations, self.batch_size * self.accumulation
        require(G > 1, "--num-generations must be at least 2: an advantage compares the completions of a prompt")
        require(window % G == 0, f"--batch-size times --accumulation is {window}, no multiple of --num-generations {G}")
        goal = self.objective
        updates, passes = goal.updates_per_rollout, self.passes
        require(updates >= 1, f"--updates-per-rollout must be at least 1, got {updates}")
        require(updates % passes == 0, f"--updates-per-rollout {updates} must be a multiple of --passes {passes}")
        require(goal.beta >= 0, f"--beta must not be negative, got {goal.beta}")
        bounds = f"got {goal.epsilon} and {goal.epsilon_high}"
        require(
            0 <= goal.epsilon < 1 and goal.epsilon_high >= 0,
            f"--epsilon must lie in [0, 1) and --epsilon-high be at least 0, {bounds}",
        )
        limit = 1 + goal.epsilon_high
        require(
            self.delta is None or self.delta > limit,
            f"--delta must be above 1 + epsilon_high = {limit:g}, got {self.delta}",
        )

    @property
    def objective(self) -> Objective:
        """The recipe's settings, under those that were given."""
        given = {name: getattr(self, name) for name in PLAIN if getattr(self, name) is not None}
        if "epsilon" in given and "epsilon_high" not in given:
            given["epsilon_high"] = given["epsilon"]
        return Objective(**(RECIPES[self.recipe] | given))

    @property
    def reward_names(self) -> list[str]:
        """--rewards, and DAPO's soft punishment of long answers where the recipe asks for it and none is given."""
        if self.recipe != "dapo" or any(name.startswith("overlong") for name in self.rewards):
            return self.rewards
        return [*self.rewards, f"overlong:{max(1, self.max_completion_length // 5)}"]

    @property
    def all_weights(self) -> list[float]:
        """--reward-weights, 1 for the punishment that the recipe added."""
        added = len(self.reward_names) - len(self.rewards)
        return [*self.reward_weights, *[1.0] * added] if self.reward_weights else []

    @property
    def prompts_per_update(self) -> int:
        return self.batch_size * self.accumulation // self.num_generations

    def window(self, update: int) -> slice:
        """The completions of a batch of rollouts that its update `update` (from 0) takes."""
        size = self.batch_size * self.accumulation
        first = update % self.minibatches * size
        return slice(first, first + size)

    @property
    def minibatches(self) -> int:
        """In how many updates' worth a batch of rollouts is cut."""
        return self.objective.updates_per_rollout // self.passes


def warnings(config: GRPOConfig, parameters: int) -> list[str]:
    """What seldom works, one line each with its reason. parameters: of the model."""
    return [*_about_the_method(config), *_about_sampling(config), *_about_the_rate(config, parameters)]


def _about_the_method(config: GRPOConfig) -> Iterator[str]:
    goal, name = config.objective, config.recipe
    by_sequence = goal.importance_sampling_level != "token"
    if by_sequence and goal.loss_type != "grpo":
        yield f"a sequence's ratio with loss {goal.loss_type} weighs sequences by length: GSPO takes --loss-type grpo"
    if by_sequence and goal.updates_per_rollout == 1:
        yield "with one update from a batch of rollouts the ratio is always 1: this is GRPO, see --updates-per-rollout"
    longest = config.max_completion_length
    if by_sequence and goal.epsilon > 0.01 and longest >= 256:
        yield f"--epsilon {goal.epsilon:g} never clips a long answer's ratio, a geometric mean: GSPO has 3e-4 and 4e-4"
    if by_sequence and goal.epsilon < 0.01 and longest < 64 and goal.updates_per_rollout > 1:
        yield (
            f"--epsilon {goal.epsilon:g} is for answers of thousands of tokens: of at most {longest}, about half are "
            "clipped after one update and teach nothing; see ratio/mean_abs_log, and start from 0.1"
        )
    if not by_sequence and goal.epsilon < 0.01:
        yield f"--epsilon {goal.epsilon:g} clips nearly every token's ratio: 0.2 is usual, GSPO's 3e-4 is for sequences"
    if name == "gspo" and not by_sequence:
        yield "GSPO without a ratio of sequences is GRPO: --importance-sampling-level sequence"
    if (goal.loss_type == "dr_grpo") != (goal.scale_rewards == "none") and name == "dr_grpo":
        yield "Dr. GRPO is loss dr_grpo and --scale-rewards none: one of them alone keeps half of the bias it removes"
    if name == "dapo" and (goal.loss_type != "dapo" or goal.epsilon_high <= goal.epsilon or not goal.dynamic_sampling):
        yield "DAPO is loss dapo, an --epsilon-high above --epsilon, and --dynamic-sampling: one of them is off"
    if goal.updates_per_rollout > 8:
        yield f"{goal.updates_per_rollout} updates from a batch of rollouts: the policy leaves the one that sampled it"


def _about_sampling(config: GRPOConfig) -> Iterator[str]:
    if config.num_generations < 4:
        yield f"groups of {config.num_generations} make a noisy mean to compare with: 8 to 16 are usual"
    if config.top_p < 1 or config.top_k > 0:
        yield "--top-p and --top-k sample from another distribution than the ratios assume: the gradient is biased"
    if config.dropout > 0:
        yield "--dropout makes the policy that trains another than the one that sampled: 0 is usual here"
    if config.objective.dynamic_sampling and config.max_resamples == 0:
        yield "--dynamic-sampling with --max-resamples 0 replaces nothing"


def _about_the_rate(config: GRPOConfig, parameters: int) -> Iterator[str]:
    rate = config.peak_rate
    # small models take more: this repository's examples, of 135M parameters, learn at 1e-4 and above
    limit = (5e-6 if config.method == "full" else 5e-5) * (1 if parameters >= 1e9 else 20)
    if rate > limit:
        yield f"learning rate {rate:g} is above {limit:g}: rewards that rise and then collapse are its usual end"
