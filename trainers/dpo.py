"""Direct preference optimisation: a model learns from pairs of answers which one people prefer, without a reward model.

    s_c = log π(y_c | x) - log π_ref(y_c | x)        of the chosen answer, summed over its tokens; s_r of the rejected
    L   = -log σ(β · (s_c - s_r))                    DPO, Rafailov et al. 2023, arXiv 2305.18290, eq. 7

β·s is the implicit reward. Its gradient raises y_c and lowers y_r, the more the surer the model is of the wrong order:
σ(β·(s_r - s_c)). At the first step π = π_ref, so L = ln 2 and the gradient is β/2 times that of s_r - s_c. Variants,
with δ = s_c - s_r:

    sigmoid        -(1-ε)·log σ(βδ) - ε·log σ(-βδ)              ε = 0 is DPO; ε > 0 cDPO: labels are wrong that often
    robust         [-(1-ε)·log σ(βδ) + ε·log σ(-βδ)] / (1-2ε)   unbiased under such labels (arXiv 2403.00409)
    hinge          max(0, 1 - βδ)                               SLiC (arXiv 2305.10425)
    ipo            (s_c/n_c - s_r/n_r - 1/(2β))²                IPO as its authors run it: means over n tokens
    ipo_sum        (δ - 1/(2β))²                                IPO as the paper writes it (arXiv 2310.12036, eq. 17)
    sigmoid_norm   -log σ(β·(s_c/n_c - s_r/n_r))                length-normalised DPO (Tülu 3, arXiv 2411.15124)

    RPO            L + α · (-log π(y_c | x) / n_c)              keeps log π(y_c) from falling (arXiv 2404.19733, eq. 1)

    B pairs, T tokens

π_ref is the model before training: with an adapter the same weights with it switched off, else a second, frozen model
(reference.py). Chosen and rejected go through the model in one forward.

    qlora dpo --model smollm2-135m --data pairs.jsonl --method qlora --out runs/preferred

Left out: f-divergences, losses over sorted batches (AOT), several losses at once, a reference that moves.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from data.formats import describe
from data.order import DataOrder
from data.preference import EncodedPair
from lora import trainable_parameters
from models import Decoder, load_tokenizer

from . import run_folder, world
from .dpo_config import LOSS_TYPES, DPOConfig, check_dpo
from .loop import train_step
from .metrics import ProgressLine, read_metrics
from .optimizers import make_optimizer
from .pairs import (
    PairBatch,
    Totals,
    answer_logps,
    count_pairs,
    encode,
    evaluate_pairs,
    my_batches,
    over_world,
    pair_batches,
    pair_recipe,
    said_of,
    scores_of,
    untrained,
    write_pair_results,
)
from .prepare import prepare_model
from .recipes import PreferenceHealth, warnings
from .reference import Reference, compute_table, from_table, live_reference, read_tables, write_tables
from .run import Run, Trained, finished

__all__ = ["LOSS_TYPES", "DPOConfig", "dpo_loss", "rpo_term", "train"]


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, rewards of the chosen, rewards of the rejected answers), each (B,); rewards carry no gradient.

    The four logps (B,) are sums over an answer's tokens, the lengths (B,) their number; 0 counts as 1. Raises
    ValueError for an unknown loss_type, a setting outside its range, and lengths missing where the loss is of means.
    """
    check_dpo(beta, loss_type, label_smoothing)
    chosen, rejected = policy_chosen_logps - ref_chosen_logps, policy_rejected_logps - ref_rejected_logps
    rewards = beta * chosen.detach(), beta * rejected.detach()
    if loss_type in ("ipo", "sigmoid_norm"):
        if chosen_lengths is None or rejected_lengths is None:
            raise ValueError(f"loss_type {loss_type} is of means over tokens: it needs both lengths")
        chosen, rejected = chosen / chosen_lengths.clamp(min=1), rejected / rejected_lengths.clamp(min=1)
    delta, eps = chosen - rejected, label_smoothing
    if loss_type in ("ipo", "ipo_sum"):
        losses = (delta - 1 / (2 * beta)) ** 2
    elif loss_type == "hinge":
        losses = torch.relu(1 - beta * delta)
    elif loss_type == "robust":
        losses = (-(1 - eps) * F.logsigmoid(beta * delta) + eps * F.logsigmoid(-beta * delta)) / (1 - 2 * eps)
    else:
        losses = -(1 - eps) * F.logsigmoid(beta * delta) - eps * F.logsigmoid(-beta * delta)
    return losses, *rewards


def rpo_term(policy_chosen_logps: Tensor, chosen_lengths: Tensor) -> Tensor:
    """-log π(y_c | x) / n_c, (B,): the chosen answer's own negative log-likelihood a token; 0 without a token."""
    return -policy_chosen_logps / chosen_lengths.clamp(min=1)


def train(config: DPOConfig, *, quiet: bool = False) -> Trained:
    """Train and write the run's folder. Raises ValueError or OSError for what a user got wrong.

    With resume, a run that is finished already is not trained again: its model and its last numbers come back.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    data, held_out = config.datasets()
    env = run_folder.environment(run_folder.rows_hash(data.rows))
    run_folder.check(Path(config.out), asdict(config), env, resume=config.resume)

    tokenizer = load_tokenizer(config.model).with_chat_template(config.chat_template)
    train_set = encode(config, tokenizer, data)
    pairs, pad_id = train_set.pairs, tokenizer.pad_id
    held_pairs = encode(config, tokenizer, held_out).pairs if held_out else []
    order = DataOrder([pair.tokens for pair in pairs], config.seed)
    window = config.batch_size * config.accumulation * world.world_size()
    total_steps = config.max_steps or max(1, math.ceil(len(pairs) * config.epochs / window))
    if config.resume and (last_row := run_folder.last_row_if_finished(Path(config.out), total_steps)):
        return finished(config, tokenizer, last_row, quiet=quiet)
    model = prepare_model(config)
    parameters = trainable_parameters(model)
    optimizer = make_optimizer(config, parameters)
    warned = warnings(pair_recipe(config, model, train_set, order, window, total_steps))

    with Run(config, env, warned, parameters, optimizer, total_steps, quiet=quiet) as run:
        run.introduce(model, f"data: {data.schema.explanation}; {train_set.report}", describe(tokenizer))
        reference = reference_of(config, model, {"train": pairs, "eval": held_pairs}, pad_id, run.progress)
        health = PreferenceHealth(config.TRAINER, read_metrics(run.metrics.path))
        model.train()
        for step in run.steps_left():
            batches = my_batches(pairs, order.step(window, step), config.batch_size, pad_id)
            counts, rate, totals = over_world(count_pairs(batches)), config.rate(step, total_steps), Totals()
            share = partial(share_of_loss, config, model, reference["train"], totals=totals, num_items=counts.pairs)
            with run.speed.measured(counts.tokens):
                loss, grad_norm = train_step(
                    batches,
                    share,
                    parameters,
                    optimizer,
                    learning_rate=rate,
                    max_grad_norm=config.max_grad_norm,
                    skips=run.skips,
                )
            row: dict[str, Any] = {"pairs": counts.pairs, "learnt_tokens": counts.learnt_tokens}
            row |= totals.means(counts.pairs, everywhere=True)
            if held_pairs and run.evaluation_is_due(step):
                held = pair_batches(held_pairs, range(len(held_pairs)), config.batch_size, pad_id)
                share = partial(share_of_loss, config, model, reference["eval"], num_items=len(held_pairs))
                row |= evaluate_pairs(model, held, share)
                run.progress.say(f"step {step + 1}: {said_of(row)} on {len(held_pairs)} held-out pairs")
            for line in health.new_warnings(row):
                run.progress.say(f"warning: {line}")
            run.end_step(step, loss, grad_norm, rate, **row)
    write_pair_results(config, model, tokenizer, held_out, run.progress)
    return Trained(model, tokenizer, run.result())


def share_of_loss(
    config: DPOConfig, model: Decoder, reference: Reference, batch: PairBatch, *, totals: Totals, num_items: int
) -> Tensor:
    """A micro-batch's share of the window's loss, a scalar: Σ over its pairs / num_items, the pairs of the window."""
    ref_chosen, ref_rejected = reference(batch).chunk(2)
    policy = answer_logps(model, batch.rows)
    chosen, rejected = policy.sums.chunk(2)
    chosen_lengths, rejected_lengths = policy.lengths.chunk(2)
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        chosen,
        rejected,
        ref_chosen,
        ref_rejected,
        beta=config.beta,
        loss_type=config.loss_type,
        label_smoothing=config.label_smoothing,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    totals.add(scores_of(chosen_rewards, rejected_rewards, chosen, rejected))
    if config.rpo_alpha:
        nll = rpo_term(chosen, chosen_lengths)
        totals.add({"nll_loss": nll})
        losses = losses + config.rpo_alpha * nll
    return losses.sum() / num_items


def reference_of(
    config: DPOConfig,
    model: Decoder,
    sets: Mapping[str, Sequence[EncodedPair]],
    pad_id: int,
    progress: ProgressLine,
) -> dict[str, Reference]:
    """For each set of pairs, what the model said of them before training: see reference.py."""
    if not config.precompute_ref:
        return dict.fromkeys(sets, live_reference(config, model))
    path = Path(config.out) / "reference.safetensors"
    tables = read_tables(path, sets)
    if tables is None:
        progress.say(f"reference: computing {sum(map(len, sets.values())):,} pairs, kept in {path}")
        with untrained(config, model) as base:
            tables = {name: compute_table(base, pairs, config.batch_size, pad_id) for name, pairs in sets.items()}
        write_tables(path, tables, sets)
    return {name: from_table(table) for name, table in tables.items()}
