"""GRPO and its relatives: the advantages of a group, and the loss of a batch of completions.

GRPO (arXiv 2402.03300) samples G completions of a prompt and compares them with one another, not with a value model:

    A_i    = (r_i - mean(r)) / (std(r) + eps)                   over the G of a group; std with G - 1 (scale "group")
    ρ_it   = exp(logp_it - old_logp_it)                         how much likelier the token is now than when sampled
    ℓ_it   = -min(ρ_it · A_i, clip(ρ_it, 1 - ε, 1 + ε_high) · A_i) + β · k_it
    k_it   = exp(d) - d - 1,  d = ref_logp_it - logp_it         never below 0; its mean estimates KL(policy ‖ reference)

`importance_sampling_level` says whose ratio it is:

    token           ρ_it as above
    sequence        s_i = exp(mean_t (logp_it - old_logp_it)) for every token of i: GSPO (arXiv 2507.18071)
    sequence_token  sg(s_i) · p_it / sg(p_it): the value s_i, and each token's own gradient (GSPO-token, there 4.3)

`loss_type` says how the ℓ_it of the counted tokens (m_it = 1) become one number. n is `num_items`:

    grpo            Σ_i (Σ_t ℓ_it / |o_i|) / n                   n sequences: each weighs the same
    dapo, bnpo      Σ_it ℓ_it / n                                n counted tokens: each weighs the same (2503.14476)
    dr_grpo         Σ_it ℓ_it / (n · max_completion_length)      n sequences: no length in it (2503.20783)

dapo and bnpo differ in TRL, where bnpo's n is a micro-batch's; over a whole window they are one. `delta` also bounds ρ
where A < 0, which the min leaves unbounded (arXiv 2505.07291). While the policy is still the one that sampled, ρ = 1:
the loss is -mean A, near 0, and its gradient is not.

    B completions, prompt-major in groups of G; T tokens of the longest completion

Differences of log-probabilities are cut at ±20 before exp, so that nothing overflows: beyond, a ratio is e^±20 and its
gradient 0. Left out: entropy bonus, CISPO, SAPO, weights for rollouts from another engine, several processes.

    qlora grpo --data rows.jsonl --rewards exact --recipe gspo --out runs/grpo
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.dataset import read_datasets
from data.formats import describe as describe_format
from lora import count_parameters, disabled_adapters, trainable_parameters
from models import Decoder, load_tokenizer

from . import run_folder, world
from .grpo_config import GRPOConfig, warnings
from .grpo_metrics import CURVES, health, masked_mean, merged_metrics, sampling_difference
from .loop import split, train_step
from .metrics import MetricsFile
from .optimizers import make_optimizer
from .prepare import load_base, prepare_model
from .results import write_plots, write_weights
from .rewards import make_rewards
from .rollout import Prompt, Rollout, Sampler, Scored, collect, describe, encode_prompts, rollout_logps, to_rollout
from .run import Run, Trained, finished

__all__ = ["GRPOConfig", "group_advantages", "grpo_loss", "loss_items", "train"]

SCALES = ("group", "batch", "none")
LOSS_TYPES = ("dapo", "grpo", "bnpo", "dr_grpo")
LEVELS = ("token", "sequence", "sequence_token")
LARGEST_LOG_RATIO = 20.0
EVALUATED_AT_ONCE = 64


def group_advantages(rewards: Tensor, num_generations: int, *, scale: str = "group", eps: float = 1e-4) -> Tensor:
    """How much better than its group each completion is: fp32 (B,) from rewards (B,), prompt-major.

    scale: divide by the group's std, by the batch's, or not at all ("none": Dr. GRPO). A NaN is a completion without a
    reward: it takes no part in means and stds, and its advantage is 0. A group without spread has advantages 0.
    Raises ValueError when B is no multiple of num_generations, or for another scale.
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    if num_generations < 1 or rewards.numel() % num_generations:
        raise ValueError(f"{rewards.numel()} rewards are no whole number of groups of {num_generations}")
    groups = rewards.double().view(-1, num_generations)  # float64: equal rewards give exactly 0
    centred = groups - torch.nanmean(groups, dim=1, keepdim=True)
    if scale == "group":
        centred = centred / (_nanstd(groups) + eps)
    elif scale == "batch":
        centred = centred / (_nanstd(groups.view(1, -1)) + eps)
    return centred.nan_to_num(nan=0.0).flatten().to(torch.float32)


def _nanstd(x: Tensor) -> Tensor:
    """The standard deviation of each row with n - 1, NaN left out; 0 for rows of fewer than two numbers: (rows, 1)."""
    n = x.isnan().logical_not().sum(dim=1, keepdim=True)
    squares = (x - torch.nanmean(x, dim=1, keepdim=True)).square().nansum(dim=1, keepdim=True)
    return (squares / (n - 1).clamp(min=1)).sqrt()


def grpo_loss(
    per_token_logps: Tensor,
    old_per_token_logps: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    ref_per_token_logps: Tensor | None = None,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    loss_type: str = "dapo",
    importance_sampling_level: str = "token",
    max_completion_length: int | None = None,
    num_items: int | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """(loss, a scalar; metrics). Gradients flow into per_token_logps alone.

    per_token_logps, old_per_token_logps (None: the same, detached), ref_per_token_logps: (B, T); advantages (B,);
    completion_mask (B, T), 1 = counts: what the others hold elsewhere does not matter. epsilon_high None: epsilon.
    num_items: of the whole window, in the loss type's unit (see above); None: this batch's own. A batch without a
    counted token gives 0. metrics are means over the counted tokens, of which "tokens" is the number: clip_ratio/low
    (ρ < 1 - ε and A < 0), clip_ratio/high (ρ > 1 + ε_high and A > 0), ratio/mean, ratio/min, ratio/max,
    ratio/mean_abs_log of abs(log ρ), and kl with a reference. Raises ValueError for settings outside their range, or
    that need one which is not given.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    _check(loss_type, importance_sampling_level, epsilon, high, delta, max_completion_length)
    if beta and ref_per_token_logps is None:
        raise ValueError(f"beta {beta} needs ref_per_token_logps")
    mask, A = completion_mask != 0, advantages[:, None]
    old = per_token_logps.detach() if old_per_token_logps is None else old_per_token_logps
    ratio = _importance_ratio(_difference(per_token_logps, old, mask), mask, importance_sampling_level)
    unclipped = ratio if delta is None else ratio.clamp(max=delta)
    per_token_loss = -torch.min(unclipped * A, ratio.clamp(1 - epsilon, 1 + high) * A)
    metrics = _ratio_metrics(ratio.detach(), A, mask, epsilon, high)
    if ref_per_token_logps is not None:
        d = _difference(ref_per_token_logps, per_token_logps, mask)
        per_token_kl = d.exp() - d - 1
        per_token_loss = per_token_loss + beta * per_token_kl
        metrics["kl"] = masked_mean(per_token_kl.detach(), mask)
    return _aggregate(per_token_loss * mask, mask, loss_type, max_completion_length, num_items), metrics


def loss_items(loss_type: str, completion_mask: Tensor) -> int:
    """What `num_items` counts, in this batch: counted tokens or sequences."""
    return int((completion_mask != 0).sum()) if loss_type in ("dapo", "bnpo") else completion_mask.shape[0]


def _difference(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """a - b where counted, 0 elsewhere, within ±20."""
    return (a.masked_fill(~mask, 0) - b.masked_fill(~mask, 0)).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def _importance_ratio(log_ratio: Tensor, mask: Tensor, level: str) -> Tensor:
    """(B, T): each token's own, or that of its sequence."""
    if level == "token":
        return log_ratio.exp()
    mean = log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    if level == "sequence":
        return mean.exp().expand_as(log_ratio)
    return (mean.detach() + log_ratio - log_ratio.detach()).exp()


def _aggregate(
    per_token_loss: Tensor, mask: Tensor, loss_type: str, max_completion_length: int | None, num_items: int | None
) -> Tensor:
    items = max(1, loss_items(loss_type, mask) if num_items is None else num_items)
    if loss_type == "grpo":
        return (per_token_loss.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum() / items
    if loss_type == "dr_grpo":
        return per_token_loss.sum() / (items * (max_completion_length or 1))
    return per_token_loss.sum() / items


def _ratio_metrics(ratio: Tensor, A: Tensor, mask: Tensor, epsilon: float, high: float) -> dict[str, float]:
    counted = ratio[mask] if mask.any() else ratio.new_ones(1)
    return {
        "tokens": int(mask.sum()),
        "clip_ratio/low": masked_mean((ratio < 1 - epsilon) & (A < 0), mask),
        "clip_ratio/high": masked_mean((ratio > 1 + high) & (A > 0), mask),
        "ratio/mean": float(counted.mean()),
        "ratio/min": float(counted.min()),
        "ratio/max": float(counted.max()),
        "ratio/mean_abs_log": masked_mean(ratio.log().abs(), mask),
    }


def _check(
    loss_type: str, level: str, epsilon: float, high: float, delta: float | None, max_completion_length: int | None
) -> None:
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}")
    if level not in LEVELS:
        raise ValueError(f"importance_sampling_level must be one of {', '.join(LEVELS)}, got {level!r}")
    if not (0 <= epsilon < 1 and high >= 0):
        raise ValueError(f"epsilon must lie in [0, 1) and epsilon_high be at least 0, got {epsilon} and {high}")
    if delta is not None and delta <= 1 + high:
        raise ValueError(f"delta must be above 1 + epsilon_high = {1 + high:g}, got {delta}")
    if loss_type == "dr_grpo" and not max_completion_length:
        raise ValueError("loss_type dr_grpo divides by max_completion_length, which is not given")


def train(config: GRPOConfig, *, quiet: bool = False) -> Trained:
    """Train and write the run's folder. Raises ValueError or OSError for what a user got wrong.

    With resume, a run that is finished already is not trained again: its model and its last numbers come back.
    """
    if world.world_size() > 1:
        raise ValueError("qlora grpo trains in one process: start it without torchrun")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    out, goal = Path(config.out), config.objective
    data, held_out = read_datasets(config)
    rewards = make_rewards(config.reward_names, config.all_weights, max_completion_length=config.max_completion_length)
    env = run_folder.environment(run_folder.rows_hash(data.rows))
    run_folder.check(out, asdict(config), env, resume=config.resume)
    tokenizer = load_tokenizer(config.model).with_chat_template(config.chat_template)
    count = config.prompts_per_update * config.minibatches
    if len(data.rows) < count:
        raise ValueError(f"{data.path}: a batch of rollouts takes {count} prompts, found {len(data.rows)}")
    total_steps = config.max_steps or math.ceil(len(data.rows) * config.epochs / count) * goal.updates_per_rollout
    if config.resume and (last_row := run_folder.last_row_if_finished(out, total_steps)):
        return finished(config, tokenizer, last_row, quiet=quiet)

    model = prepare_model(config)
    room = {"max_completion_length": config.max_completion_length, "context": model.config.max_position_embeddings}
    prompts = encode_prompts(tokenizer, data, **room)
    held_prompts = encode_prompts(tokenizer, held_out, **room) if held_out else []
    sampler = Sampler(model, tokenizer, rewards, config)
    parameters = trainable_parameters(model)
    optimizer = make_optimizer(config, parameters)
    reference = _reference(config, model)
    with Run(
        config, env, warnings(config, count_parameters(model)[1]), parameters, optimizer, total_steps, quiet=quiet
    ) as run:
        run.introduce(
            model,
            f"data: {data.schema.explanation}; {len(prompts):,} prompts, {len(held_prompts):,} held out",
            f"{describe_format(tokenizer)}; recipe {config.recipe}: {goal}",
            f"a batch of rollouts: {count} prompts × {config.num_generations} completions; rewards: "
            + ", ".join(f"{reward.weight:g} · {reward.name}" for reward in rewards),
            "this loss stays near 0 by its making: watch reward, kl and entropy",
        )
        samples = MetricsFile(out / "samples.jsonl", run.done if run.metrics.last else None)
        rollout, place = Rollout.from_buffer(run.buffer)
        told: set[str] = set()
        reward = run.metrics.last.get("reward")
        if held_prompts and not run.metrics.last:
            run.metrics.append(step=0, **_evaluate(run, sampler, held_prompts, samples, 0))
        for step in run.steps_left():
            row: dict[str, Any] = {}
            update, rate = step % goal.updates_per_rollout, config.rate(step, total_steps)
            if update == 0 or rollout is None:
                with run.speed.measured(0):
                    scored, place, replaced = collect(sampler, prompts, place, count, dynamic=goal.dynamic_sampling)
                    rollout = _to_rollout(scored, config)
                    rollout = _with_fixed_logps(rollout, model, reference, prompts, config)
                row = describe(scored, config.num_generations) | {"prompts_drawn": place.drawn, "replaced": replaced}
                reward = row["reward"]
                if rollout.old_logps is not None:
                    row |= sampling_difference(rollout.old_logps, rollout.sampling_logps, rollout.completion_mask)
                _keep_samples(samples, step + 1, scored[: config.samples], rollout.advantages.tolist(), prompts)
            window = config.window(update)
            num_items = loss_items(goal.loss_type, rollout.completion_mask[window])
            batches = split(_worth_a_forward(rollout, window, goal.beta), config.batch_size)
            seen: list[dict[str, float]] = []

            def loss_of(rows: Sequence[int], of: Rollout = rollout, n: int = num_items, seen: list = seen) -> Tensor:
                share, metrics = _loss_of(model, of, list(rows), prompts, config, n)
                seen.append(metrics)
                return share

            with run.speed.measured(int(rollout.lengths[window].sum())):
                loss, grad_norm = train_step(
                    batches,
                    loss_of,
                    parameters,
                    optimizer,
                    learning_rate=rate,
                    max_grad_norm=config.max_grad_norm,
                    skips=run.skips,
                )
            row |= merged_metrics(seen)
            if held_prompts and run.evaluation_is_due(step):
                row |= _evaluate(run, sampler, held_prompts, samples, step + 1)
            for number, line in health({"step": step + 1} | row, by_token=goal.importance_sampling_level == "token"):
                if number not in told:
                    run.progress.say(f"warning, step {step + 1}: {line}")
                    told.add(number)
            note = "" if reward is None else f"reward {reward:.3f}"
            run.end_step(step, loss, grad_norm, rate, buffer=rollout.buffer(place), note=note, **row)
    write_weights(config, model, tokenizer, run.progress)
    write_plots(out, CURVES, run.progress)
    return Trained(model, tokenizer, run.result())


def _loss_of(
    model: Decoder, rollout: Rollout, rows: list[int], prompts: Sequence[Prompt], config: GRPOConfig, num_items: int
) -> tuple[Tensor, dict[str, float]]:
    """The share of these completions in the window's loss."""
    goal = config.objective
    logps, entropy = rollout_logps(model, rollout, rows, prompts, temperature=config.temperature)
    mask = rollout.completion_mask[rows]
    loss, metrics = grpo_loss(
        logps,
        None if rollout.old_logps is None else rollout.old_logps[rows],
        rollout.advantages[rows],
        mask,
        ref_per_token_logps=None if rollout.ref_logps is None else rollout.ref_logps[rows],
        beta=goal.beta,
        epsilon=goal.epsilon,
        epsilon_high=goal.epsilon_high,
        delta=config.delta,
        loss_type=goal.loss_type,
        importance_sampling_level=goal.importance_sampling_level,
        max_completion_length=config.max_completion_length,
        num_items=num_items,
    )
    metrics["entropy"] = masked_mean(entropy, mask != 0)
    if rollout.old_logps is None:  # the policy that trains is still the one that sampled
        metrics |= sampling_difference(logps.detach(), rollout.sampling_logps[rows], mask)
    return loss, metrics


def _to_rollout(scored: Sequence[Scored], config: GRPOConfig) -> Rollout:
    goal, rewards = config.objective, torch.tensor([one.reward for one in scored], dtype=torch.float64)
    advantages = group_advantages(rewards, config.num_generations, scale=goal.scale_rewards)
    return to_rollout(scored, advantages, mask_truncated=goal.mask_truncated)


def _reference(config: GRPOConfig, model: Decoder) -> Decoder | None:
    """The model before training, where the KL asks for it: with adapters the same one, without them a second one."""
    if not config.objective.beta:
        return None
    return model if config.method != "full" else load_base(config, config.model).requires_grad_(False)


@torch.no_grad()
def _with_fixed_logps(
    rollout: Rollout, model: Decoder, reference: Decoder | None, prompts: Sequence[Prompt], config: GRPOConfig
) -> Rollout:
    """The rollout with what its updates compare with: the reference's log-probabilities, and where there is more than
    one update, the policy's own as they are now."""
    was_training = model.training
    model.eval()  # no dropout

    def every(of: Decoder) -> Tensor:
        parts = split(range(len(rollout.prompts)), config.batch_size)
        temperature = config.temperature
        return torch.cat([rollout_logps(of, rollout, rows, prompts, temperature=temperature)[0] for rows in parts])

    old = every(model) if config.objective.updates_per_rollout > 1 else None
    ref = None
    if reference is not None:
        with disabled_adapters(model) if reference is model else nullcontext():
            ref = every(reference)
    model.train(was_training)
    return rollout._replace(old_logps=old, ref_logps=ref)


def _worth_a_forward(rollout: Rollout, window: slice, beta: float) -> list[int]:
    """Those of a window's completions that can have a gradient; one, where none can."""
    counted = rollout.completion_mask.any(dim=1)
    if not beta:
        counted = counted & (rollout.advantages != 0)
    rows = range(len(counted))[window]
    return [i for i in rows if counted[i]] or [rows[0]]


def _evaluate(
    run: Run, sampler: Sampler, prompts: Sequence[Prompt], samples: MetricsFile, step: int
) -> dict[str, float | None]:
    """Rewards and lengths of greedy completions, as eval_reward and its like."""
    scored = [
        group[0]
        for numbers in split(range(len(prompts)), EVALUATED_AT_ONCE)
        for group in sampler.complete(prompts, numbers, greedy=True)
    ]
    kept = scored[: run.flags.samples]
    _keep_samples(samples, step, kept, [None] * len(kept), prompts)
    row = {key: value for key, value in describe(scored, 1, "eval_").items() if not key.endswith("std")}
    run.progress.say(f"step {step}: mean reward {row['eval_reward']:.4f} on {len(prompts)} held-out prompts, greedy")
    return row


def _keep_samples(
    file: MetricsFile,
    step: int,
    scored: Sequence[Scored],
    advantages: Sequence[float | None],
    prompts: Sequence[Prompt],
) -> None:
    """samples.jsonl: one completion a line. Held-out ones are compared with no group: advantage None."""
    for one, advantage in zip(scored, advantages, strict=False):
        about = {"prompt": prompts[one.prompt].messages, "wanted": prompts[one.prompt].wanted}
        said = {"completion": one.text, "finish_reason": one.completion.finish_reason}
        file.append(step=step, **about, **said, rewards=one.rewards, reward=one.reward, advantage=advantage)
