"""Odds ratio preference optimisation: fine-tuning and preference in one loss, without a reference model.

    P(y | x)  = exp(mean_t log p(y_t | x, y_<t))             geometric mean over the answer's tokens
    odds(p)   = p / (1 - p)
    L = NLL(y_c | x) - λ · log σ(log odds(P_c) - log odds(P_r))        ORPO, Hong et al. 2024, arXiv 2403.07691, eq. 6

With lp = log P, log odds = lp - log(1 - e^lp). The last logarithm is taken in one of two forms, since 1 - e^lp has no
digits left when lp is near 0, and e^lp none beside 1 when lp is far from it (Mächler 2012):

    log(1 - e^x)  =  log(-expm1(x))   for x > -ln 2,      log1p(-exp(x))   otherwise

    B pairs, T tokens

The NLL is summed over the chosen answers' tokens (`--nll answer`), or over their prompts too, as TRL and the authors do
(`--nll all`), and divided by the number of such tokens in the whole window; the odds term is a mean over its pairs.

    qlora orpo --model smollm2-135m --data pairs.jsonl --method qlora --out runs/preferred
"""

import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from data.batch import Batch
from data.formats import describe
from data.order import DataOrder
from lora import trainable_parameters
from models import Decoder, load_tokenizer

from . import run_folder, world
from .logprobs import sequence_logps, unpadded_logps
from .loop import train_step
from .metrics import read_metrics
from .optimizers import make_optimizer
from .orpo_config import ORPOConfig
from .pairs import (
    PairBatch,
    Totals,
    count_pairs,
    encode,
    evaluate_pairs,
    my_batches,
    over_world,
    pair_batches,
    pair_recipe,
    said_of,
    scores_of,
    write_pair_results,
)
from .prepare import prepare_model
from .recipes import PreferenceHealth, warnings
from .run import Run, Trained, finished

__all__ = ["ORPOConfig", "log1mexp", "orpo_loss", "train"]


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - eˣ) for x ≤ 0, in x's dtype; x nearer to 0 than one rounding of 1 counts as that, with gradient 0."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def orpo_loss(
    chosen_mean_logps: Tensor,
    rejected_mean_logps: Tensor,
    chosen_nll: Tensor,
    *,
    lambda_or: float = 0.1,
    num_items: int | None = None,
    num_pairs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(a batch's share of the window's loss: a scalar, log odds ratios (B,) without a gradient).

    chosen_mean_logps, rejected_mean_logps (B,): mean log-probability of an answer's tokens, ≤ 0. chosen_nll (B,): sums
    over tokens. num_items: tokens in chosen_nll over the whole window; num_pairs: its pairs. None: this batch's pairs.
    Raises ValueError when lambda_or is negative.
    """
    if not 0 <= lambda_or < math.inf:
        raise ValueError(f"lambda_or must not be negative, got {lambda_or}")
    wide = torch.promote_types(chosen_mean_logps.dtype, torch.float32)
    chosen, rejected = chosen_mean_logps.to(wide), rejected_mean_logps.to(wide)
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    items, pairs = (max(1, len(chosen) if n is None else n) for n in (num_items, num_pairs))
    loss = chosen_nll.sum() / items - lambda_or * F.logsigmoid(log_odds).sum() / pairs
    return loss, log_odds.detach()


def train(config: ORPOConfig, *, quiet: bool = False) -> Trained:
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
        health = PreferenceHealth(config.TRAINER, read_metrics(run.metrics.path))
        model.train()
        for step in run.steps_left():
            batches = my_batches(pairs, order.step(window, step), config.batch_size, pad_id)
            counts, rate, totals = over_world(count_pairs(batches)), config.rate(step, total_steps), Totals()
            items = int(world.sum_over_world(count_items(config, batches)))
            share = partial(share_of_loss, config, model, totals=totals, num_items=items, num_pairs=counts.pairs)
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
            row |= per_item(totals.means(counts.pairs, everywhere=True), items / counts.pairs)
            if held_pairs and run.evaluation_is_due(step):
                held = pair_batches(held_pairs, range(len(held_pairs)), config.batch_size, pad_id)
                items = count_items(config, held)
                share = partial(share_of_loss, config, model, num_items=items, num_pairs=len(held_pairs))
                row |= per_item(evaluate_pairs(model, held, share), items / len(held_pairs))
                run.progress.say(f"step {step + 1}: {said_of(row)} on {len(held_pairs)} held-out pairs")
            for line in health.new_warnings(row):
                run.progress.say(f"warning: {line}")
            run.end_step(step, loss, grad_norm, rate, **row)
    write_pair_results(config, model, tokenizer, held_out, run.progress)
    return Trained(model, tokenizer, run.result())


def share_of_loss(
    config: ORPOConfig, model: Decoder, batch: PairBatch, *, totals: Totals, num_items: int, num_pairs: int
) -> Tensor:
    """A micro-batch's share of the window's loss, a scalar."""
    rows, counted = batch.rows, counted_tokens(config, batch.rows)
    needed = counted | rows.completion_mask  # the rejected answers are compared, but not counted in the NLL
    logps = unpadded_logps(model, rows.input_ids, rows.segment_ids, needed)
    answers = rows.completion_mask[:, 1:]
    means = sequence_logps(logps, answers) / answers.sum(dim=1).clamp(min=1)
    chosen, rejected = means.chunk(2)
    nll = -sequence_logps(logps, counted[:, 1:]).chunk(2)[0]
    loss, log_odds = orpo_loss(
        chosen, rejected, nll, lambda_or=config.lambda_or, num_items=num_items, num_pairs=num_pairs
    )
    rewards = config.lambda_or * chosen.detach(), config.lambda_or * rejected.detach()
    totals.add(scores_of(*rewards, chosen, rejected))
    totals.add({"nll_loss": nll, "log_odds_chosen": log_odds, "log_odds_ratio": F.logsigmoid(log_odds)})
    return loss


def counted_tokens(config: ORPOConfig, rows: Batch) -> Tensor:
    """int64 (2B, T): 1 where the NLL counts a token; none of the rejected conversations."""
    counted = rows.completion_mask if config.nll == "answer" else (rows.segment_ids > 0).long()
    chosen, rejected = counted.chunk(2)
    return torch.cat([chosen, torch.zeros_like(rejected)])


def count_items(config: ORPOConfig, batches: list[PairBatch]) -> int:
    """num_items of these batches: tokens that the NLL counts; a conversation's first has none before it."""
    return sum(int(counted_tokens(config, batch.rows)[:, 1:].sum()) for batch in batches)


def per_item(means: dict[str, float], items_per_pair: float) -> dict[str, float]:
    """The means with nll_loss, which is a sum over tokens, divided by tokens."""
    return {name: value / items_per_pair if name.endswith("nll_loss") else value for name, value in means.items()}
