"""trainers/grpo: the loop. It learns, windows add up, first steps are what they must be, runs resume to the bit."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from commands import inspect_run
from data.dataset import read_datasets
from lora import load_adapter, trainable_parameters
from models import load_model, load_tokenizer
from qlora import main
from tests.small_base import ROWS, write_base, write_rows
from trainers import grpo
from trainers.checkpoint import all_checkpoints
from trainers.grpo import LEVELS, LOSS_TYPES
from trainers.metrics import read_metrics
from trainers.prepare import prepare_model
from trainers.rewards import make_rewards
from trainers.rollout import Place, Sampler, collect, encode_prompts

ROOT = Path(__file__).parent.parent
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def config(base, tmp_path) -> grpo.GRPOConfig:
    (tmp_path / "own.py").write_text(OWN)
    return grpo.GRPOConfig(
        data=str(write_rows(tmp_path / "rows.jsonl")), out=str(tmp_path / "run"), model=str(base), threads=1, r=4,
        rewards=[f"{tmp_path}/own.py:low_ids"], batch_size=4, accumulation=2, num_generations=4, max_steps=4,
        max_completion_length=10, learning_rate=1e-2, loraplus_ratio=16.0, samples=4,
    )  # fmt: skip


OWN = """
def low_ids(answers):
    return [sum(i < 200 for i in a.ids) / len(a.ids) for a in answers]
def breaks(answers):
    return [1.0]
"""


def rows_of(config):
    return read_metrics(Path(config.out) / "metrics.jsonl")


def adapter_bytes(out: Path | str) -> bytes:
    return (Path(out) / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("recipe", ["grpo", "gspo"])
def test_a_recipe_raises_a_reward(config, recipe):
    """A random model's tokens are below 200 as often as chance has it; training makes that nearly always."""
    eval_data = write_rows(Path(config.out).parent / "eval.jsonl", ROWS[:4])
    config = replace(
        config, recipe=recipe, max_steps=16 if recipe == "grpo" else 24, learning_rate=3e-2, method="full",
        loraplus_ratio=None, eval_data=str(eval_data),
        schedule="constant", warmup_ratio=0.0, batch_size=8, accumulation=1,
    )  # fmt: skip
    grpo.train(config, quiet=True)
    rows = rows_of(config)
    rewards = [row["reward"] for row in rows if row.get("reward") is not None]
    assert rows[0]["step"] == 0
    assert rewards[-1] > rewards[0] + 0.5 * (1 - rewards[0])
    assert rows[-1]["eval_reward"] > rows[0]["eval_reward"]
    assert max(row.get("sampling/logp_difference_max", 0.0) for row in rows) <= 128 * EPS


def rollout_of(config):
    """(model, prompts, rollout): a batch of rollouts of an adapter that is not its base, with unequal lengths."""
    data, _ = read_datasets(config)
    tokenizer = load_tokenizer(config.model)
    model = prepare_model(config)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model):
            parameter.add_(0.05 * torch.randn_like(parameter)) if "lora_B" in name else None
    room = {"max_completion_length": config.max_completion_length, "context": 256}
    prompts = encode_prompts(tokenizer, data, **room)
    rewards = make_rewards(config.rewards, [], max_completion_length=config.max_completion_length)
    count = config.prompts_per_update * config.minibatches
    scored, _, _ = collect(Sampler(model, tokenizer, rewards, config), prompts, Place(), count, dynamic=False)
    rollout = grpo._to_rollout(scored, config)
    cut = torch.tensor([2 + (3 * i) % 9 for i in range(len(scored))]).clamp(max=rollout.ids.shape[1])
    rollout = rollout._replace(
        lengths=torch.minimum(rollout.lengths, cut),
        completion_mask=rollout.completion_mask * (torch.arange(rollout.ids.shape[1]) < cut[:, None]),
    )
    return model, prompts, rollout


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_a_window_cut_in_any_way_gives_one_loss_and_gradient(config, loss_type, level):
    """1 × 8, 2 × 4, 3 and 8 × 1 completions a forward: the prompt is shared by one, some or all of its group."""
    config = replace(config, loss_type=loss_type, importance_sampling_level=level, beta=0.1)
    model, prompts, rollout = rollout_of(config)
    noise = 0.3 * torch.randn(rollout.ids.shape)
    rollout = rollout._replace(old_logps=rollout.sampling_logps + noise, ref_logps=rollout.sampling_logps - noise)
    n = grpo.loss_items(loss_type, rollout.completion_mask)

    def window(size):
        total = 0.0
        for start in range(0, 8, size):
            rows = list(range(start, min(8, start + size)))
            share, _ = grpo._loss_of(model, rollout, rows, prompts, config, n)
            share.backward()
            total += share.item()
        gradients = [p.grad.clone() for _, p in trainable_parameters(model)]
        model.zero_grad()
        return total, gradients

    whole, one = window(8), None
    for size in (1, 2, 3):
        one = window(size)
        assert one[0] == pytest.approx(whole[0], abs=32 * EPS)
        for a, b in zip(one[1], whole[1], strict=True):
            assert (a - b).norm() <= 128 * EPS * max(b.norm(), 1e-2)


def test_completions_without_a_gradient_are_left_out_of_the_forward(config):
    _, _, rollout = rollout_of(config)
    rollout = rollout._replace(advantages=torch.tensor([0.0, 1.0, -1.0, 0.0, 0.0, 0.0, 0.5, -0.5]))
    assert grpo._worth_a_forward(rollout, slice(0, 8), 0.0) == [1, 2, 6, 7]
    assert grpo._worth_a_forward(rollout, slice(0, 8), 0.1) == list(range(8))
    assert grpo._worth_a_forward(rollout, slice(3, 6), 0.0) == [3]
    masked = rollout._replace(completion_mask=rollout.completion_mask * torch.tensor([1, 0] * 4)[:, None])
    assert grpo._worth_a_forward(masked, slice(0, 8), 0.0) == [2, 6]


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_first_step_has_no_loss_no_kl_and_a_gradient(config, method):
    """Policy, sampler and reference are one model: loss 0, KL 0. After an update the KL is above 0."""
    config = replace(config, method=method, loraplus_ratio=None, max_steps=3, beta=0.1, learning_rate=1e-3)
    grpo.train(config, quiet=True)
    first, *_, last = rows_of(config)
    assert abs(first["loss"]) <= 8 * EPS
    assert first["kl"] <= 8 * EPS < last["kl"]
    assert first["grad_norm"] > 1e-3
    assert first["ratio/min"] == first["ratio/max"] == 1


def test_further_updates_are_measured_from_the_policy_that_sampled(config):
    config = replace(config, updates_per_rollout=4, passes=2, beta=0.0, schedule="constant")
    grpo.train(config, quiet=True)
    first, second, third, fourth = rows_of(config)
    assert first["ratio/max"] == pytest.approx(1, abs=32 * EPS)
    assert second["ratio/max"] > 1 + 1e-4  # its completions are new, the policy is not
    assert third["ratio/max"] > 1 + 1e-4
    assert [("reward" in row) for row in (first, second, third, fourth)] == [True, False, False, False]


def test_cut_completions_are_masked_on_request(config):
    grpo.train(replace(config, mask_truncated=True, max_steps=1), quiet=True)
    row = rows_of(config)[0]
    samples = [json.loads(line) for line in (Path(config.out) / "samples.jsonl").read_text().splitlines()]
    assert row["completions/clipped_ratio"] > 0.5
    assert row["learnt_tokens"] < 0.5 * 8 * row["completions/mean_length"]
    assert len(samples) == 4
    assert {"step", "prompt", "wanted", "completion", "finish_reason", "rewards", "reward", "advantage"} == set(
        samples[0]
    )


def test_dynamic_sampling_replaces_groups_without_spread_up_to_a_limit(config):
    """A reward that only some prompts can get: the rest make room."""
    own = Path(config.out).parent / "own.py"
    own.write_text(
        "def own(answers):\n    return [len(set(a.ids)) * (int(a.wanted.split()[2]) % 3 == 0) for a in answers]\n"
    )
    config = replace(config, rewards=[f"{own}:own"], dynamic_sampling=True, max_resamples=16, max_steps=2)
    grpo.train(config, quiet=True)
    for row in rows_of(config):
        assert row["frac_reward_zero_std"] == 0
    assert rows_of(config)[-1]["replaced"] > 0
    assert rows_of(config)[-1]["prompts_drawn"] > 4
    plain = replace(config, dynamic_sampling=False, out=config.out + "2", max_steps=2)
    grpo.train(plain, quiet=True)
    assert max(row["frac_reward_zero_std"] for row in rows_of(plain)) > 0


def test_a_killed_run_resumes_to_the_same_bytes(config, tmp_path):
    """SIGKILL between the updates of a batch of rollouts, with a reference, dynamic sampling and held-out rows."""
    config = replace(
        config, updates_per_rollout=4, passes=2, beta=0.1, dynamic_sampling=True, max_steps=8, save_every=2,
        eval_data=str(write_rows(tmp_path / "eval.jsonl", ROWS[:2])), eval_every=3,
    )  # fmt: skip
    whole = replace(config, out=str(tmp_path / "whole"))
    grpo.train(whole, quiet=True)
    out = Path(config.out)
    script = "import json, sys; from trainers import grpo; grpo.train(grpo.GRPOConfig(**json.loads(sys.argv[1])))"
    process = subprocess.Popen(
        [sys.executable, "-c", script, json.dumps(config.__dict__)], cwd=ROOT, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while process.poll() is None and len(list((out / "checkpoints").glob("step-*"))) < 2:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    grpo.train(replace(config, resume=True), quiet=True)
    assert adapter_bytes(out) == adapter_bytes(whole.out)
    for file in ("samples.jsonl", "metrics.jsonl"):
        resumed, straight = (read_metrics(Path(folder) / file) for folder in (out, whole.out))
        kept = ("step", "loss", "kl", "completion", "reward", "eval_reward")
        timeless = [[{k: row.get(k) for k in kept} for row in rows] for rows in (resumed, straight)]
        assert timeless[0] == timeless[1]


def test_a_run_killed_in_its_first_evaluation_keeps_each_answer_once(config):
    """samples.jsonl has them already, metrics.jsonl does not: the evaluation is made again."""
    config = replace(config, eval_data=str(write_rows(Path(config.out).parent / "eval.jsonl", ROWS[:2])), max_steps=1)
    grpo.train(config, quiet=True)
    out = Path(config.out)
    straight = read_metrics(out / "samples.jsonl")
    shutil.rmtree(out / "adapter")
    (out / "metrics.jsonl").unlink()
    grpo.train(replace(config, resume=True), quiet=True)
    assert read_metrics(out / "samples.jsonl") == straight


def test_a_checkpoint_within_a_batch_of_rollouts_keeps_it(config, tmp_path):
    """Every step's checkpoint resumes to the same bytes, also those whose rollout is not used up."""
    config = replace(config, updates_per_rollout=3, passes=3, max_steps=4, save_every=1, keep_checkpoints=9)
    grpo.train(config, quiet=True)
    for left in (3, 2):
        copy = tmp_path / f"copy{left}"
        shutil.copytree(config.out, copy)
        shutil.rmtree(copy / "adapter")
        for path in all_checkpoints(copy / "checkpoints")[left:]:
            shutil.rmtree(path)
        grpo.train(replace(config, out=str(copy), resume=True), quiet=True)
        assert adapter_bytes(config.out) == adapter_bytes(copy)


def test_a_run_leaves_its_folder(config, base):
    trained = grpo.train(replace(config, max_steps=2, beta=0.1), quiet=True)
    out = Path(config.out)
    assert sorted(p.name for p in (out / "plots").iterdir()) == [
        f"{n}.png" for n in ("clip", "entropy", "kl", "length", "reward")
    ]
    reloaded = load_adapter(load_model(base, dtype=torch.float32, quantize="nf4"), out / "adapter")
    ids = torch.arange(20)[None]
    assert torch.equal(reloaded.eval()(ids), trained.model.eval()(ids))
    again = grpo.train(replace(config, max_steps=2, beta=0.1, resume=True), quiet=True)
    assert again.result.steps == 2
    run_config = json.loads((out / "config.json").read_text())["config"]
    said = inspect_run.lines(run_config, rows_of(config), [])
    assert any(line.startswith("reward       0.") for line in said)


def test_the_command_says_rewards_before_and_after(config, base, capsys):
    flags = [
        "--data",
        config.data,
        "--out",
        config.out,
        "--model",
        str(base),
        "--rewards",
        "length:3",
        "--max-steps",
        "1",
    ]
    flags += ["--batch-size", "4", "--accumulation", "1", "--num-generations", "4", "--max-completion-length", "4"]
    assert main(["grpo", *flags, "--eval-data", config.data]) == 0
    said = capsys.readouterr().out
    assert "mean reward of rollouts: 0." in said
    (line,) = re.findall(r"mean reward of held-out prompts, greedy: (.*) before, (.*) after", said)
    metrics = read_metrics(Path(config.out) / "metrics.jsonl")
    assert line == tuple(f"{row['eval_reward']:.3f}" for row in metrics)
    assert main(["inspect", "run", config.out]) == 0
    ends = "{:.4f} at step 0, {:.4f} at step 1".format(*(row["eval_reward"] for row in metrics))
    assert f"held out     reward {ends}" in capsys.readouterr().out
    held_out = [row for row in read_metrics(Path(config.out) / "samples.jsonl") if row["advantage"] is None]
    assert [row["step"] for row in held_out] == [0] * 8 + [1] * 8
    for first, last in zip(held_out[:2], held_out[8:10], strict=True):
        assert first["prompt"] == last["prompt"]
        shown = f"(wanted: {first['wanted']})", f"  before: {' '.join(first['completion'].split())}"
        assert "\n".join(shown) in said
        assert f"  after:  {' '.join(last['completion'].split())}" in said
    assert (
        main(["grpo", *flags, "--eval-data", config.data, "--out", config.out + "3", "--rewards", "length:3", "exact"])
        == 0
    )
    said = capsys.readouterr().out
    assert "mean reward of held-out prompts, length:3 alone: 0." in said
    assert "mean reward of held-out prompts, exact alone: 0.000 before, 0.000 after" in said
    assert main(["grpo", *flags, "--out", config.out + "2", "--rewards", "exakt"]) == 2
    assert capsys.readouterr().err.startswith("qlora grpo: reward 'exakt' is none of exact, number,")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_completion_length": 250}, r"rows.jsonl: row 1: its prompt has \d+ tokens, and with --max-completion-l"),
        ({"accumulation": 40, "max_completion_length": 2}, "takes 40 prompts, found 24"),
        ({"rewards": ["nonsense"]}, "reward 'nonsense' is none of exact"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_its_folder_exists(config, changes, message):
    with pytest.raises(ValueError, match=message):
        grpo.train(replace(config, **changes), quiet=True)
    assert not Path(config.out).exists()


def test_a_reward_of_the_wrong_length_ends_the_run_in_one_line(config):
    rewards = [config.rewards[0].replace("low_ids", "breaks")]
    with pytest.raises(ValueError, match="breaks got 8 answers and returned 1 numbers"):
        grpo.train(replace(config, rewards=rewards), quiet=True)
