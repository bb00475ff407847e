"""trainers/rollout: prompts drawn in order, groups with and without spread, what is sampled, what a buffer keeps."""

import json
import math
from dataclasses import dataclass, replace

import pytest
import torch

from data.dataset import Dataset, read_datasets
from data.flags import DataFlags
from data.order import epoch_order
from data.schema import detect
from models import load_model, load_tokenizer
from tests.small_base import ROWS, write_base
from trainers.rewards import Answer, Reward, make_rewards, score
from trainers.rollout import (
    Place,
    Rollout,
    Sampler,
    collect,
    describe,
    draw,
    encode_prompts,
    has_spread,
    rollout_logps,
    to_rollout,
)


@dataclass(frozen=True)
class Flags:
    num_generations: int = 4
    max_completion_length: int = 8
    temperature: float = 1.3
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 3
    max_resamples: int = 2


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(sampler of 4 × 8 tokens whose reward is a token count, prompts)."""
    base = write_base(tmp_path_factory.mktemp("base") / "tiny")
    model, tokenizer = load_model(base), load_tokenizer(base)
    data = Dataset(ROWS, detect(ROWS, "rows"), "rows")
    prompts = encode_prompts(tokenizer, data, max_completion_length=8, context=256)
    sampler = Sampler(model, tokenizer, [Reward("odd", 2.0, lambda a: [x.ids[0] % 2 for x in a])], Flags())
    return sampler, prompts


def test_prompts_are_those_of_the_rows(made):
    sampler, prompts = made
    assert [prompt.wanted for prompt in prompts] == [row["output"] for row in ROWS]
    assert prompts[3].row == ROWS[3]
    assert "Say the number." in sampler.tokenizer.decode(prompts[3].ids)


def test_prompts_come_in_the_order_of_the_epochs():
    n, seed = 5, 7
    stream = epoch_order(n, seed, 0) + epoch_order(n, seed, 1)
    assert draw(n, seed, 0, 3, set()) == (stream[:3], 3)
    numbers, drawn = draw(n, seed, 3, 4, set())
    assert numbers == list(dict.fromkeys(stream[3:]))[:4], "over the end of an epoch, no prompt twice"
    assert len(set(numbers)) == 4
    assert drawn >= 7
    assert draw(n, seed, 0, 3, set(range(5)))[0] == []
    assert draw(n, seed, 0, 9, {stream[0]})[0] == stream[1:5]


def test_a_batch_is_sampled_anew_each_round_and_the_same_from_the_same_place(made):
    sampler, prompts = made
    first, place, replaced = collect(sampler, prompts, Place(), 3, dynamic=False)
    again, _, _ = collect(sampler, prompts, Place(), 3, dynamic=False)
    assert [one.completion for one in first] == [one.completion for one in again]
    assert place == Place(3, 1)
    assert replaced == 0
    assert [one.prompt for one in first[::4]] == epoch_order(len(prompts), 3, 0)[:3]
    later, _, _ = collect(sampler, prompts, Place(0, 1), 3, dynamic=False)
    assert [one.completion.ids for one in first] != [one.completion.ids for one in later]
    for one in first:
        assert one.rewards == {"odd": one.completion.ids[0] % 2}
        assert one.reward == 2 * one.rewards["odd"]


def test_groups_without_spread_make_room_and_fill_up_in_the_end(made):
    sampler, prompts = made
    lucky = set(epoch_order(len(prompts), 3, 0)[4:6])
    rule = Reward("some", 1.0, lambda answers: [x.ids[0] * (x.wanted in wanted) for x in answers])
    wanted = {prompts[i].wanted for i in lucky}
    sampler = replace(sampler, rewards=[rule], flags=Flags(max_resamples=2))
    scored, place, replaced = collect(sampler, prompts, Place(), 3, dynamic=True)
    assert place.rounds == 3
    assert place.drawn == 3 + 3 + 1
    assert {one.prompt for one in scored[:8]} == lucky
    assert len(scored) == 12
    assert replaced == 7 - 3
    assert not has_spread(scored[8:])
    assert describe(scored, 4)["frac_reward_zero_std"] == pytest.approx(1 / 3)


def test_a_missing_reward_is_no_spread(made):
    sampler, prompts = made
    scored, _, _ = collect(sampler, prompts, Place(), 1, dynamic=False)
    with_rewards = [one._replace(reward=r) for one, r in zip(scored, (1.0, math.nan, 1.0, math.nan), strict=True)]
    assert not has_spread(with_rewards)
    assert has_spread([*with_rewards[:3], scored[3]._replace(reward=0.0)])
    row = describe([one._replace(rewards={"odd": None}) for one in with_rewards], 4)
    assert (row["reward"], row["rewards/odd/mean"]) == (1.0, None)


def test_sampled_log_probabilities_are_those_of_a_forward(made):
    """Both at the temperature of sampling, in fp32: they differ by rounding."""
    sampler, prompts = made
    scored, _, _ = collect(sampler, prompts, Place(), 3, dynamic=False)
    rollout = to_rollout(scored, torch.zeros(12), mask_truncated=False)
    logps, _ = rollout_logps(sampler.model, rollout, range(12), prompts, temperature=1.3)
    assert (logps - rollout.sampling_logps).abs().max() <= 64 * torch.finfo(torch.float32).eps
    other, _ = rollout_logps(sampler.model, rollout, range(12), prompts, temperature=1.0)
    assert (other - rollout.sampling_logps).abs().max() > 1e-3


def test_cut_completions_do_not_count_on_request(made):
    sampler, prompts = made
    scored, _, _ = collect(sampler, prompts, Place(), 1, dynamic=False)
    ended = replace(scored[1].completion, finish_reason="stop", ids=[7, 8], logps=[-1.0, -2.0])
    scored[1] = scored[1]._replace(completion=ended)
    rollout = to_rollout(scored, torch.arange(4.0), mask_truncated=True)
    assert rollout.completion_mask.sum(dim=1).tolist() == [0, 2, 0, 0]
    assert to_rollout(scored, torch.arange(4.0), mask_truncated=False).completion_mask[1].tolist() == [1, 1] + [0] * 6
    assert rollout.ids[1].tolist() == [7, 8] + [0] * 6
    assert describe(scored, 4)["completions/clipped_ratio"] == 0.75


def test_a_buffer_brings_the_rollout_back(made):
    sampler, prompts = made
    scored, place, _ = collect(sampler, prompts, Place(), 2, dynamic=False)
    rollout = to_rollout(scored, torch.randn(8), mask_truncated=False)
    for kept in (rollout, rollout._replace(old_logps=torch.randn(8, 8), ref_logps=torch.randn(8, 8))):
        back, at = Rollout.from_buffer(kept.buffer(place))
        assert at == place
        for a, b in zip(kept, back, strict=True):
            assert a is b is None or torch.equal(a, b)
    assert Rollout.from_buffer({}) == (None, Place())


def test_gsm8ks_format_is_a_task(made, tmp_path):
    """Its columns by a template, its answers by the number after ####."""
    path = tmp_path / "gsm8k.jsonl"
    row = {"question": "Ann has 3 pens and buys 4. How many has she?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"}
    path.write_text(json.dumps(row) + "\n")
    data, _ = read_datasets(DataFlags(data=str(path), template="{question} => {answer}"))
    sampler, _ = made
    (prompt,) = encode_prompts(sampler.tokenizer, data, max_completion_length=8, context=256)
    assert "How many has she?" in sampler.tokenizer.decode(prompt.ids)
    rewards = make_rewards(["number"], [], max_completion_length=8)
    given = [Answer(prompt.messages, text, [1], True, prompt.wanted, prompt.row) for text in ("#### 7", "It is 8.")]
    assert score(rewards, given)[0] == [1, 0]


def test_a_prompt_that_leaves_no_room_is_named(made):
    sampler, _ = made
    data = Dataset(ROWS, detect(ROWS, "rows"), "rows.jsonl")
    with pytest.raises(ValueError, match=r"rows.jsonl: row 1: its prompt has \d+ tokens, .* context of 20$"):
        encode_prompts(sampler.tokenizer, data, max_completion_length=8, context=20)
