"""trainers/on_policy.py: which rows are sampled, what a prompt is, and samples that depend on seed and step alone."""

import pytest
import torch

from data.encode import Encoded
from models import generate
from tests.small_llama import small_decoder
from trainers.on_policy import prompt_of, sample_answers, sampled_rows


def test_which_rows_are_sampled_follows_from_seed_and_step_and_place() -> None:
    assert sampled_rows(3, 5, 64, 0.5) == sampled_rows(3, 5, 64, 0.5)
    assert sampled_rows(3, 5, 64, 0.5)[:8] == sampled_rows(3, 5, 8, 0.5)
    assert len({tuple(sampled_rows(seed, step, 64, 0.5)) for seed in range(4) for step in range(4)}) == 16


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.9, 1.0])
def test_the_share_is_the_fraction(fraction: float) -> None:
    coins = [coin for step in range(200) for coin in sampled_rows(1, step, 32, fraction)]
    deviation = (fraction * (1 - fraction) / len(coins)) ** 0.5
    assert abs(sum(coins) / len(coins) - fraction) <= 4 * deviation


@pytest.mark.parametrize(
    ("mask", "prompt"),
    [
        ([0, 0, 1, 1], [10, 11]),
        ([0, 0, 1, 1, 0], [10, 11]),
        ([0, 1, 0, 0, 1, 0], [10, 11, 12, 13]),
        ([0, 1, 1, 0, 0, 1], [10, 11, 12, 13, 14]),
        ([1, 1], []),
    ],
)
def test_a_prompt_is_what_stands_before_the_last_answer(mask: list[int], prompt: list[int]) -> None:
    ids = list(range(10, 10 + len(mask)))
    assert prompt_of(Encoded(ids, mask)) == prompt


def test_an_answer_is_what_the_model_generates_and_every_token_of_it_is_learnt() -> None:
    model = small_decoder().train()
    examples = [Encoded([5, 6, 7, 8], [0, 0, 1, 1]), Encoded([9, 10, 11], [0, 1, 1])]
    options = {"max_new_tokens": 12, "temperature": 1.3, "stop_ids": (3, 4, 5, 6)}
    found = sample_answers(model, examples, seed=1, step=2, **options)
    assert model.training
    assert sample_answers(model, examples[1:], seed=1, step=2, **options) == found[1:]
    assert sample_answers(model, examples, seed=1, step=3, **options) != found
    assert sample_answers(model, examples, seed=2, step=2, **options) != found
    for example, sampled in zip(examples, found, strict=True):
        prompt = prompt_of(example)
        answer = sampled.ids[len(prompt) :]
        assert sampled.ids[: len(prompt)] == prompt
        assert sampled.completion_mask == [0] * len(prompt) + [1] * len(answer)
        assert len(answer) == 12 or answer[-1] in options["stop_ids"]
    torch.manual_seed(123)  # torch's own random state plays no part
    assert sample_answers(model, examples, seed=1, step=2, **options) == found
    assert generate(model, [[5, 6]], **options)[0].ids != found[0].ids[2:]
