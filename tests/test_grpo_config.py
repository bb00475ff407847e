"""trainers/grpo_config, grpo_metrics: recipes fill in what is not given; what is no method or no health is said."""

import pytest
import torch

from trainers.grpo_config import GRPOConfig, warnings
from trainers.grpo_metrics import health, merged_metrics, sampling_difference


def config(**changes):
    return GRPOConfig(**({"data": "d", "out": "o", "rewards": ["exact"]} | changes))


def test_recipes_are_the_papers():
    grpo, dapo, dr_grpo, gspo = (config(recipe=name).objective for name in ("grpo", "dapo", "dr_grpo", "gspo"))
    assert (grpo.loss_type, grpo.epsilon, grpo.epsilon_high, grpo.beta, grpo.scale_rewards) == (
        "grpo",
        0.2,
        0.2,
        0.04,
        "group",
    )
    assert (dapo.loss_type, dapo.epsilon_high, dapo.beta, dapo.dynamic_sampling, dapo.mask_truncated) == (
        "dapo",
        0.28,
        0,
        True,
        True,
    )
    assert (dr_grpo.loss_type, dr_grpo.scale_rewards, dr_grpo.beta) == ("dr_grpo", "none", 0)
    assert (gspo.importance_sampling_level, gspo.loss_type, gspo.epsilon, gspo.epsilon_high) == (
        "sequence",
        "grpo",
        3e-4,
        4e-4,
    )
    assert gspo.updates_per_rollout == 4


def test_a_flag_wins_over_the_recipe():
    goal = config(recipe="dapo", epsilon=0.1, beta=0.3, dynamic_sampling=False).objective
    assert (goal.epsilon, goal.epsilon_high, goal.beta, goal.dynamic_sampling) == (0.1, 0.1, 0.3, False)
    assert goal.loss_type == "dapo"


def test_dapo_punishes_long_answers_unless_told_how():
    dapo = config(recipe="dapo", max_completion_length=100, reward_weights=[2.0])
    assert dapo.reward_names == ["exact", "overlong:20"]
    assert dapo.all_weights == [2.0, 1.0]
    assert config(recipe="dapo", rewards=["exact", "overlong:3"]).reward_names == ["exact", "overlong:3"]
    assert config(recipe="grpo").reward_names == ["exact"]


def test_windows_of_a_batch_of_rollouts():
    """4 updates, 2 passes: two windows, each taken twice."""
    it = config(updates_per_rollout=4, passes=2, batch_size=4, accumulation=4, num_generations=8)
    assert it.prompts_per_update == 2
    assert it.minibatches == 2
    assert [it.window(update) for update in range(4)] == [slice(0, 16), slice(16, 32)] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_generations": 1}, "--num-generations must be at least 2"),
        ({"batch_size": 3}, "--batch-size times --accumulation is 24, no multiple of --num-generations 16"),
        ({"temperature": 0.0}, "--temperature must be above 0"),
        ({"updates_per_rollout": 3, "passes": 2}, "--updates-per-rollout 3 must be a multiple of --passes 2"),
        ({"updates_per_rollout": 0}, "--updates-per-rollout must be at least 1"),
        ({"beta": -1.0}, "--beta must not be negative"),
        ({"epsilon": 1.2}, r"--epsilon must lie in \[0, 1\)"),
        ({"delta": 1.1}, r"--delta must be above 1 \+ epsilon_high = 1.2, got 1.1"),
        ({"recipe": "ppo"}, "--recipe must be one of grpo, dapo, dr_grpo, gspo, got 'ppo'"),
        ({"max_resamples": -1}, "--max-resamples must not be negative"),
        ({"max_completion_length": 0}, "--max-completion-length must be at least 1"),
    ],
)
def test_a_flag_outside_its_range_is_refused(changes, message):
    if "batch_size" in changes:
        changes["num_generations"] = 16
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recipe": "gspo", "loss_type": "dapo"}, "weighs sequences by length"),
        ({"recipe": "gspo", "updates_per_rollout": 1}, "the ratio is always 1: this is GRPO"),
        ({"recipe": "gspo", "epsilon": 0.2}, "never clips a long answer's ratio"),
        ({"recipe": "gspo", "max_completion_length": 12}, "of at most 12, about half are clipped after one update"),
        ({"recipe": "gspo", "importance_sampling_level": "token"}, "GSPO without a ratio of sequences is GRPO"),
        ({"epsilon": 3e-4}, "clips nearly every token's ratio"),
        ({"recipe": "dr_grpo", "scale_rewards": "group"}, "keeps half of the bias"),
        ({"recipe": "dapo", "epsilon": 0.2}, "DAPO is loss dapo, an --epsilon-high above --epsilon"),
        ({"num_generations": 2}, "groups of 2 make a noisy mean"),
        ({"top_p": 0.9}, "the gradient is biased"),
        ({"dropout": 0.1}, "--dropout makes the policy that trains another"),
        ({"learning_rate": 1e-3}, "learning rate 0.001 is above 5e-05"),
        ({"updates_per_rollout": 16}, "16 updates from a batch of rollouts"),
        ({"dynamic_sampling": True, "max_resamples": 0}, "replaces nothing"),
    ],
)
def test_what_is_not_the_method_is_said(changes, said):
    lines = warnings(config(**changes), int(7e9))
    assert sum(said in line for line in lines) == 1, lines


def test_recipes_themselves_are_not_warned_about():
    for name in ("grpo", "dapo", "dr_grpo", "gspo"):
        assert warnings(config(recipe=name), int(7e9)) == []


@pytest.mark.parametrize(
    ("row", "number"),
    [
        ({"step": 20, "reward": 0.1}, "reward"),
        ({"step": 1, "frac_reward_zero_std": 0.8}, "spread"),
        ({"step": 1, "completions/clipped_ratio": 0.9}, "cut"),
        ({"step": 1, "entropy": 0.01}, "entropy"),
        ({"step": 1, "kl": 2.5}, "kl"),
        ({"step": 1, "clip_ratio/low": 0.2, "clip_ratio/high": 0.2}, "clip"),
        ({"step": 1, "sampling/logp_difference_mean": 0.1}, "sampling"),
    ],
)
def test_what_is_not_healthy_is_said_and_nothing_else(row, number):
    assert [name for name, _ in health(row, by_token=True)] == [number]
    fine = {"step": 19, "reward": 0.0, "entropy": 0.4, "kl": None, "clip_ratio/low": 0.1}
    assert not list(health(fine, by_token=True))
    assert not list(health({"step": 1, "clip_ratio/low": 0.4}, by_token=False))


def test_sequences_may_be_clipped_more_but_not_mostly():
    row = {"step": 1, "clip_ratio/low": 0.3, "clip_ratio/high": 0.3, "ratio/mean_abs_log": 0.052}
    ((number, line),) = health(row, by_token=False)
    assert number == "clip"
    assert line.endswith("--epsilon 0.1 clips less")


def test_micro_batches_make_an_update():
    parts = [
        {"tokens": 1, "kl": 3.0, "ratio/min": 0.5, "ratio/max": 2.0},
        {"tokens": 3, "kl": 1.0, "ratio/min": 0.7, "ratio/max": 1.0},
    ]
    assert merged_metrics(parts) == {"learnt_tokens": 4, "kl": 1.5, "ratio/min": 0.5, "ratio/max": 2.0}
    nothing = [{"tokens": 0, "kl": 0.0}]
    assert merged_metrics(nothing) == {"learnt_tokens": 0, "kl": None}


def test_the_sampler_is_compared_at_counted_tokens_only():
    logps, sampled = torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-1.5, -2.0, 0.0]])
    found = sampling_difference(logps, sampled, torch.tensor([[1, 1, 0]]))
    assert found == {"sampling/logp_difference_mean": 0.25, "sampling/logp_difference_max": 0.5}
