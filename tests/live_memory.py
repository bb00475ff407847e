"""One update of each trainer over random tokens, and the peak of live tensor bytes in it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.bench_train_step import LiveBytes
from data.batch import Batch
from lora import LoRAConfig, add_adapter, trainable_parameters
from lora.attach import quantize_model
from models import Decoder, DecoderConfig, generate
from optim import PagedAdamW
from trainers import distill, dpo, grpo, orpo, sft
from trainers.grpo import _loss_of
from trainers.logprobs import per_token_nll
from trainers.loop import train_step
from trainers.memory import Setup
from trainers.pairs import PairBatch, Totals
from trainers.reference import live_reference
from trainers.rollout import Prompt, Rollout
from trainers.teacher import LoadedTeacher


class Measured(NamedTuple):
    peak: int
    model: Decoder
    optimizer: torch.optim.Optimizer


def model_of(config: DecoderConfig, setup: Setup) -> Decoder:
    """As trainers/prepare.py makes it, of random weights."""
    torch.manual_seed(0)
    model = Decoder(config)
    dtype = torch.bfloat16 if setup.dtype == "bf16" else torch.float32
    if setup.method == "full":
        model.compute_dtype = dtype
    else:
        model.to(dtype)
        if setup.method == "qlora":
            quantize_model(model, blocksize=setup.blocksize, double_quant=setup.double_quant)
        add_adapter(model, LoRAConfig(r=setup.r, alpha=setup.r))
    model.gradient_checkpointing = setup.gradient_checkpointing
    return model.train()


def optimizer_of(model: Decoder, setup: Setup) -> torch.optim.Optimizer:
    parameters = [parameter for _, parameter in trainable_parameters(model)]
    if setup.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=1e-4)
    return PagedAdamW(parameters, lr=1e-4, state_bits=8 if setup.optimizer == "paged_adamw_8bit" else 32)


def measure(config: DecoderConfig, setup: Setup) -> Measured:
    """The third update, when the optimizer's state is there: its peak of live bytes."""
    model = model_of(config, setup)
    teacher = Decoder(setup.teacher).eval().requires_grad_(False) if setup.teacher else None
    optimizer = optimizer_of(model, setup)
    update = UPDATES[setup.trainer](model, setup, teacher, optimizer)
    for _ in range(2):
        update()
    with LiveBytes(_held(model, teacher, optimizer)) as live:
        update()
    return Measured(live.peak, model, optimizer)


def _held(model: Decoder, teacher: Decoder | None, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What is there before the update; the caller must keep no reference, or gradients would outlive their end."""
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    if isinstance(optimizer, PagedAdamW) and optimizer.table is not None:
        state = list(optimizer.table.resident.values())
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [*model.parameters(), *model.buffers(), *state, *grads, *(teacher.parameters() if teacher else ())]


def _stepper(model: Decoder, setup: Setup, optimizer: Any, batch: Any, loss_of: Callable[[Any], Tensor]) -> Callable:
    parameters = trainable_parameters(model)
    return lambda: train_step(
        [batch] * setup.accumulation, loss_of, parameters, optimizer, learning_rate=1e-4, max_grad_norm=1.0
    )


def _batch(rows: int, tokens: int, vocab: int) -> Batch:
    ids = torch.randint(0, vocab, (rows, tokens))
    return Batch(ids, torch.ones_like(ids), torch.ones_like(ids))


def _sft(model: Decoder, setup: Setup, _: Any, optimizer: Any) -> Callable:
    batch = _batch(setup.batch_size, setup.sequence_length, model.config.vocab_size)

    def loss_of(batch: Batch) -> Tensor:
        nll = per_token_nll(model, batch.input_ids, batch.segment_ids, batch.completion_mask)
        return sft.sft_loss(nll, batch.completion_mask, 1000)

    return _stepper(model, setup, optimizer, batch, loss_of)


def _pairs(model: Decoder, setup: Setup) -> PairBatch:
    rows = _batch(2 * setup.batch_size, setup.sequence_length, model.config.vocab_size)
    return PairBatch(rows, list(range(setup.batch_size)))


def _dpo(model: Decoder, setup: Setup, teacher: Decoder | None, optimizer: Any) -> Callable:
    config = dpo.DPOConfig(data="", out="", method=setup.method, precompute_ref=setup.method == "full")
    batch = _pairs(model, setup)
    reference = (lambda b: torch.zeros(2 * len(b.numbers))) if setup.method == "full" else live_reference(config, model)

    def loss_of(batch: PairBatch) -> Tensor:
        return dpo.share_of_loss(config, model, reference, batch, totals=Totals(), num_items=4)

    return _stepper(model, setup, optimizer, batch, loss_of)


def _orpo(model: Decoder, setup: Setup, _: Any, optimizer: Any) -> Callable:
    config = orpo.ORPOConfig(data="", out="", method=setup.method)

    def loss_of(batch: PairBatch) -> Tensor:
        return orpo.share_of_loss(config, model, batch, totals=Totals(), num_items=1000, num_pairs=4)

    return _stepper(model, setup, optimizer, _pairs(model, setup), loss_of)


def _distill(model: Decoder, setup: Setup, teacher: Decoder | None, optimizer: Any) -> Callable:
    assert teacher is not None
    batch = _batch(setup.batch_size, setup.sequence_length, model.config.vocab_size)

    def loss_of(batch: Batch) -> Tensor:
        numbers = range(setup.batch_size)
        return distill.compare(model, LoadedTeacher(teacher), "train", batch, numbers, 0.0, 1.0).loss.mean()

    return _stepper(model, setup, optimizer, batch, loss_of)


def _grpo(model: Decoder, setup: Setup, _: Any, optimizer: Any) -> Callable:
    G, L = setup.num_generations, setup.max_completion_length
    P = setup.sequence_length - L
    n = setup.batch_size * setup.accumulation
    config = grpo.GRPOConfig(
        data="", out="", rewards=["exact"], beta=0.0, num_generations=G, max_completion_length=L,
        batch_size=setup.batch_size, accumulation=setup.accumulation, method=setup.method,
    )  # fmt: skip
    V = model.config.vocab_size
    prompts = [Prompt(torch.randint(0, V, (P,)).tolist(), [], "", {}) for _ in range(n // G)]
    parameters = trainable_parameters(model)
    width = torch.ones(n, L, dtype=torch.int64)
    rollout = Rollout(
        torch.arange(n) // G, torch.randint(0, V, (n, L)), width.sum(1), width, torch.zeros(n, L), torch.randn(n)
    )
    micro = [list(range(i, i + setup.batch_size)) for i in range(0, n, setup.batch_size)]

    def update() -> None:
        ids = [prompt.ids for prompt in prompts]
        generate(model, ids, max_new_tokens=L, temperature=1.0, num_generations=G)
        train_step(
            micro, lambda rows: _loss_of(model, rollout, rows, prompts, config, n)[0], parameters, optimizer,
            learning_rate=1e-5, max_grad_norm=1.0,
        )  # fmt: skip

    return update


UPDATES = {"sft": _sft, "dpo": _dpo, "orpo": _orpo, "distill": _distill, "grpo": _grpo}
