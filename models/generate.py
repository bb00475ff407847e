"""generate: completions of a batch of prompts, greedy or sampled, with a KV cache.

    prefill   every distinct prompt once, in one right-padded batch; the head sees the last position of each alone
    repeat    the cache's rows, num_generations times
    decode    one token a row at a time (decoding.py); a row that is done leaves the batch, and its share of the cache

A prompt's completion does not depend on its company: padding is never attended to, and randomness belongs to the row
(sampling.py). In fp32 the ids are equal alone and in a batch, but for a tie within rounding. What a step does for each
row is done for all of them at once, in tensors.

    P distinct prompts, G generations of each, R = P · G rows at first, V vocabulary
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .decoder import Decoder
from .decoding import decoding_step
from .kv_cache import KVCache
from .sampling import row_key, sample

OnToken = Callable[[int, int], None]
"""(row, id)"""


@dataclass(frozen=True)
class Completion:
    ids: list[int]
    """the generated tokens, a stop token included"""
    logps: list[float]
    """log-softmax(logits / temperature) of each id, before top-k and top-p; unscaled when temperature is 0"""
    finish_reason: str
    """stop | length"""


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
    on_token: OnToken | None = None,
) -> list[Completion]:
    """num_generations completions of each prompt, prompt-major: row = prompt · num_generations + generation.

    temperature 0 is greedy; top_k 0 and top_p 1 cut nothing. A row ends with a token of stop_ids or after
    max_new_tokens. on_token(row, id) is called for every token as it comes. The model runs in eval mode and is given
    back in the mode it had.
    Raises ValueError for an empty prompt, an id outside the vocabulary, a prompt that with max_new_tokens would leave
    the context, or a setting outside its range.
    """
    _check(model, prompts, max_new_tokens, temperature, top_p, top_k, num_generations)
    if not prompts:
        return []
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    number = {prompt: at for at, prompt in enumerate(distinct)}
    G = num_generations
    rows = [[number[tuple(prompt)] * G + g for g in range(G)] for prompt in prompts]  # equal prompts, equal answers
    told = None if on_token is None else _to_all(on_token, [row for group in rows for row in group])
    training = model.training
    model.eval()
    try:
        choose = _Chooser(distinct, G, seed, temperature, top_k, top_p, model.device)
        found = _decode(model, distinct, G, choose, max_new_tokens, sorted(stop_ids), told)
    finally:
        model.train(training)
    ids, logps, counts = (t.tolist() for t in found)
    completions = []
    for r in (row for group in rows for row in group):
        own = ids[r][: counts[r]]
        completions.append(Completion(own, logps[r][: counts[r]], "stop" if own[-1] in stop_ids else "length"))
    return completions


def _to_all(on_token: OnToken, rows: list[int]) -> OnToken:
    """on_token for each of the caller's rows; rows[i] says which of ours is row i."""
    callers: dict[int, list[int]] = {}
    for caller, row in enumerate(rows):
        callers.setdefault(row, []).append(caller)

    def tell(row: int, token: int) -> None:
        for caller in callers[row]:
            on_token(caller, token)

    return tell


def _decode(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    num_generations: int,
    choose: "_Chooser",
    max_new_tokens: int,
    stop_ids: Sequence[int],
    on_token: OnToken | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """ids int64 and logps fp32 (R, max_new_tokens), and how many of them each row has (R,)."""
    cache, logits = _prefill(model, prompts, max_new_tokens)
    cache.repeat(num_generations)
    logits = logits.repeat_interleave(num_generations, dim=0)
    step, R, device = decoding_step(model), len(logits), model.device
    ids = torch.zeros(R, max_new_tokens, dtype=torch.int64, device=device)
    logps, counts = torch.zeros(R, max_new_tokens, device=device), torch.zeros(R, dtype=torch.int64, device=device)
    active, stop = torch.arange(R, device=device), torch.tensor(stop_ids, dtype=torch.int64, device=device)
    for n in range(max_new_tokens):
        tokens, chosen = choose(logits, active, n)
        ids[active, n], logps[active, n], counts[active] = tokens, chosen, n + 1
        if on_token is not None:
            for row, token in zip(active.tolist(), tokens.tolist(), strict=True):
                on_token(row, token)
        if n + 1 == max_new_tokens:
            break
        done = torch.isin(tokens, stop)
        if done.any():
            staying = _closed_ranks(done)
            active, tokens = active[staying], tokens[staying]
            if not len(active):
                break
            cache.select(staying.tolist())
        logits = model.logits(step(tokens, cache))
    return ids, logps, counts


def _closed_ranks(done: Tensor) -> Tensor:
    """Who stays, each in its place or, from the end, in that of one who leaves: bool (R,) → rows int64 (staying,)."""
    staying = (~done).nonzero()[:, 0]
    n = len(staying)
    order = torch.arange(n, device=done.device)
    order[done[:n]] = staying[staying >= n]
    return order


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


class _Chooser:
    """Chooses the next token of the rows that are still open: (logits fp32 (R, V), rows (R,), tokens so far)."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        seed: int,
        temperature: float,
        top_k: int,
        top_p: float,
        device: torch.device,
    ) -> None:
        rows = [(prompt, g) for prompt in prompts for g in range(num_generations)]
        self.keys = torch.tensor([row_key(seed, prompt, g) for prompt, g in rows], device=device)
        self.lengths = torch.tensor([len(prompt) for prompt, _ in rows], device=device)
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p

    def __call__(self, logits: Tensor, rows: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Tokens (R,) and their log-probabilities (R,)."""
        options = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return sample(logits, self.keys[rows], self.lengths[rows] + n, **options)  # type: ignore[arg-type]


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
