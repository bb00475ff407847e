"""generate: completions of prompts, greedy or sampled, with a KV cache.

    prefill   every prompt once, in one right-padded batch; the head sees the last position of each prompt only
    repeat    the cache's rows, num_generations times
    decode    one token a row at a time; a row that is done leaves the batch, and its share of the cache with it

A prompt's completion does not depend on its company: padding is never attended to, and randomness belongs to the row
(sampling.py). In fp32 the ids are equal alone and in a batch, but for a tie within rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .decoder import Decoder
from .kv_cache import KVCache
from .sampling import row_key, sample


@dataclass(frozen=True)
class Completion:
    ids: list[int]
    """the generated tokens, a stop token included"""
    logps: list[float]
    """log-softmax(logits / temperature) of each id, before top-k and top-p; unscaled when temperature is 0"""
    finish_reason: str
    """stop | length"""


@dataclass
class _Row:
    prompt: Sequence[int]
    key: int
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)


@torch.no_grad()
def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    num_generations: int = 1,
    on_token: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """num_generations completions of each prompt, prompt-major: row = prompt · num_generations + generation.

    temperature 0 is greedy; top_k 0 and top_p 1 cut nothing. A row ends with a token of stop_ids or after
    max_new_tokens. on_token(row, id) is called for every token as it comes. The model runs in eval mode and is given
    back in the mode it had.
    Raises ValueError for an empty prompt, an id outside the vocabulary, a prompt that with max_new_tokens would leave
    the context, or a setting outside its range.
    """
    _check(model, prompts, max_new_tokens, temperature, top_p, top_k, num_generations)
    rows = [_Row(prompt, row_key(seed, prompt, g)) for prompt in prompts for g in range(num_generations)]
    if not rows:
        return []
    training = model.training
    model.eval()
    try:
        cache, logits = _prefill(model, prompts, max_new_tokens)
        cache.repeat(num_generations)
        logits = logits.repeat_interleave(num_generations, dim=0)
        active = list(range(len(rows)))
        while True:
            tokens, logps = _choose(logits, [rows[i] for i in active], temperature, top_k, top_p)
            staying = []
            for at, (i, token, logp) in enumerate(zip(active, tokens, logps, strict=True)):
                rows[i].ids.append(token)
                rows[i].logps.append(logp)
                if on_token is not None:
                    on_token(i, token)
                if token not in stop_ids and len(rows[i].ids) < max_new_tokens:
                    staying.append(at)
            if not staying:
                break
            cache.select(staying)
            active = [active[at] for at in staying]
            new = torch.tensor([[tokens[at]] for at in staying], device=model.device)
            logits = model.logits(model(new, cache=cache, return_hidden=True)[:, -1])
    finally:
        model.train(training)
    return [Completion(row.ids, row.logps, "stop" if row.ids[-1] in stop_ids else "length") for row in rows]


def _prefill(model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> tuple[KVCache, Tensor]:
    """The cache after the prompts, and the logits (P, V) of what follows each."""
    lengths = [len(prompt) for prompt in prompts]
    T, device = max(lengths), model.device
    input_ids = torch.tensor([[*prompt, *[0] * (T - len(prompt))] for prompt in prompts], device=device)
    last = torch.tensor(lengths, device=device) - 1
    segment_ids = None
    if min(lengths) < T:
        segment_ids = (torch.arange(T, device=device) <= last[:, None]).long()
    capacity = T + max_new_tokens
    cache = KVCache(model.config, len(prompts), capacity, dtype=model.compute_dtype, device=device)
    hidden = model(input_ids, segment_ids=segment_ids, cache=cache, return_hidden=True)
    return cache, model.logits(hidden[torch.arange(len(prompts), device=device), last])


def _choose(
    logits: Tensor, rows: list[_Row], temperature: float, top_k: int, top_p: float
) -> tuple[list[int], list[float]]:
    """The next token of every row, and its log-probability. logits fp32 (R, V)."""
    if temperature:
        logits = (logits - logits.amax(dim=1, keepdim=True)) / temperature  # no overflow, however small it is
    logps = torch.log_softmax(logits, dim=1)
    keys = torch.tensor([row.key for row in rows], device=logits.device)
    positions = torch.tensor([len(row.prompt) + len(row.ids) for row in rows], device=logits.device)
    tokens = sample(logps, keys, positions, temperature=temperature, top_k=top_k, top_p=top_p)
    return tokens.tolist(), logps.gather(1, tokens[:, None])[:, 0].tolist()


def _check(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    num_generations: int,
) -> None:
    if max_new_tokens < 1 or num_generations < 1:
        raise ValueError(
            f"max_new_tokens and num_generations must be at least 1, got {max_new_tokens} and {num_generations}"
        )
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 (greedy) or a positive number, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (off) or positive, got {top_k}")
    context, V = model.config.max_position_embeddings, model.config.vocab_size
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} is empty: it needs at least one token")
        outside = next((i for i in prompt if not 0 <= i < V), None)
        if outside is not None:
            raise ValueError(f"prompt {number} holds token {outside}, outside the vocabulary of {V}")
        if len(prompt) + max_new_tokens > context:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens: with max_new_tokens={max_new_tokens} it would leave the "
                f"context of {context}"
            )
