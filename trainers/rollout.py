"""Rollouts: prompts are drawn, each is completed G times, and each completion is scored within its group.

    prompts ──▶ generate, G times ──▶ rewards ──▶ Scored ──▶ advantages (grpo.py) ──▶ Rollout ──▶ one or a few updates

Prompts come in the order of the epochs (data/order.py), one after the other: how many were drawn so far is `Place`.
With dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) a group whose rewards are all equal teaches nothing and
makes room for further prompts, up to a number of rounds; what is missing then is filled up with such groups.

A completion's random numbers belong to (seed, round, prompt, generation): not to its company, nor to a restart.

    n completions, prompt-major in groups of G; T tokens of the longest
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from data.chat import Message
from data.dataset import Dataset
from data.encode import encode_prompt
from data.order import epoch_order
from data.schema import to_messages
from models import Completion, Decoder, Tokenizer, generate

from .rewards import Answer, Reward, score
from .shared_prompt import completion_logps, share_prompts


class SamplingFlags(Protocol):
    """The fields of a config that say how rollouts are made."""

    @property
    def num_generations(self) -> int: ...
    @property
    def max_completion_length(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def max_resamples(self) -> int: ...


class Prompt(NamedTuple):
    ids: list[int]
    messages: list[Message]
    wanted: str
    row: dict[str, Any]


class Place(NamedTuple):
    """Where a run stands in its prompts."""

    drawn: int = 0
    """prompts so far"""
    rounds: int = 0
    """calls of generate so far"""


class Scored(NamedTuple):
    """A completion and what it is worth."""

    prompt: int
    """its number in the data"""
    completion: Completion
    text: str
    reward: float
    """NaN: no reward applies"""
    rewards: dict[str, float | None]


class Rollout(NamedTuple):
    """A batch of completions as tensors: what the updates need, and a checkpoint keeps."""

    prompts: Tensor
    """(n,) int64: the number of each one's prompt in the data"""
    ids: Tensor
    """(n, T) int64, 0 behind the end"""
    lengths: Tensor
    """(n,) int64"""
    completion_mask: Tensor
    """(n, T) int64, 1 = counts; 0 throughout for a completion that is left out"""
    sampling_logps: Tensor
    """(n, T) fp32, as the sampler saw them"""
    advantages: Tensor
    """(n,) fp32"""
    old_logps: Tensor | None = None
    """(n, T) fp32: the training forward's, before the first update"""
    ref_logps: Tensor | None = None

    def buffer(self, place: Place) -> dict[str, Tensor]:
        """For a checkpoint."""
        kept = {name: value for name, value in self._asdict().items() if value is not None}
        return kept | {"place": torch.tensor(place)}

    @staticmethod
    def from_buffer(buffer: dict[str, Tensor]) -> "tuple[Rollout | None, Place]":
        """What `buffer` gave; (None, the start) for an empty one."""
        if not buffer:
            return None, Place()
        fields = {name: value for name, value in buffer.items() if name != "place"}
        return Rollout(**fields), Place(*buffer["place"].tolist())


def encode_prompts(tokenizer: Tokenizer, data: Dataset, *, max_completion_length: int, context: int) -> list[Prompt]:
    """The questions of the rows, with the generation prompt, and the answers wanted.

    Raises ValueError, naming the row, for one that leaves no room for a completion, and for plain text.
    """
    prompts = []
    for i, row in enumerate(data.rows, start=1):
        where = f"{data.path}: row {i}"
        messages = to_messages(row, data.schema, where)
        ids = encode_prompt(tokenizer, messages[:-1])
        if len(ids) + max_completion_length > context:
            raise ValueError(
                f"{where}: its prompt has {len(ids)} tokens, and with --max-completion-length {max_completion_length} "
                f"it would leave the model's context of {context}"
            )
        prompts.append(Prompt(ids, messages[:-1], messages[-1]["content"], dict(row)))
    return prompts


def draw(n_prompts: int, seed: int, drawn: int, count: int, taken: set[int]) -> tuple[list[int], int]:
    """The next `count` prompts that are not taken, fewer where none is left; and how many were drawn by then."""
    numbers: list[int] = []
    taken = set(taken)
    while len(numbers) < count and len(taken) < n_prompts:
        number = epoch_order(n_prompts, seed, drawn // n_prompts)[drawn % n_prompts]
        drawn += 1
        if number not in taken:
            taken.add(number)
            numbers.append(number)
    return numbers, drawn


@dataclass(frozen=True)
class Sampler:
    """The policy, and what its completions are worth."""

    model: Decoder
    tokenizer: Tokenizer
    rewards: Sequence[Reward]
    flags: SamplingFlags

    def complete(
        self, prompts: Sequence[Prompt], numbers: Sequence[int], *, seed: int = 0, greedy: bool = False
    ) -> list[list[Scored]]:
        """A group of scored completions for each of the prompts of these numbers; greedy: one each, the likeliest."""
        flags, G = self.flags, 1 if greedy else self.flags.num_generations
        completions = generate(
            self.model,
            [prompts[i].ids for i in numbers],
            max_new_tokens=flags.max_completion_length,
            temperature=0.0 if greedy else flags.temperature,
            top_p=1.0 if greedy else flags.top_p,
            top_k=0 if greedy else flags.top_k,
            stop_ids=self.tokenizer.eos_ids,
            seed=seed,
            num_generations=G,
        )
        of = [number for number in numbers for _ in range(G)]
        texts = [self.tokenizer.decode(c.ids, skip_special_tokens=True) for c in completions]
        answers = [
            Answer(prompts[i].messages, text, c.ids, c.finish_reason == "stop", prompts[i].wanted, prompts[i].row)
            for i, text, c in zip(of, texts, completions, strict=True)
        ]
        totals, values = score(self.rewards, answers)
        scored = [
            Scored(i, c, text, totals[k], {name: each[k] for name, each in values.items()})
            for k, (i, text, c) in enumerate(zip(of, texts, completions, strict=True))
        ]
        return [scored[start : start + G] for start in range(0, len(scored), G)]


def collect(
    sampler: Sampler, prompts: Sequence[Prompt], place: Place, count: int, *, dynamic: bool
) -> tuple[list[Scored], Place, int]:
    """`count` groups, the place after them, and how many groups without spread were replaced.

    dynamic: replace groups without spread, in at most --max-resamples further rounds.
    """
    flags = sampler.flags
    kept: list[list[Scored]] = []
    dull: list[list[Scored]] = []
    taken: set[int] = set()
    for _ in range(1 + (flags.max_resamples if dynamic else 0)):
        numbers, drawn = draw(len(prompts), flags.seed, place.drawn, count - len(kept), taken)
        if not numbers:
            break
        taken |= set(numbers)
        groups = sampler.complete(prompts, numbers, seed=(flags.seed << 24) + place.rounds)
        place = Place(drawn, place.rounds + 1)
        for group in groups:
            (kept if has_spread(group) or not dynamic else dull).append(group)
        if len(kept) == count:
            break
    filled = dull[: count - len(kept)]
    return [one for group in kept + filled for one in group], place, len(dull) - len(filled)


def has_spread(group: Sequence[Scored]) -> bool:
    """Whether the rewards of a group differ at all: without that, it has no better and no worse."""
    known = {one.reward for one in group if not math.isnan(one.reward)}
    return len(known) > 1


def to_rollout(scored: Sequence[Scored], advantages: Tensor, *, mask_truncated: bool) -> Rollout:
    """The tensors of scored completions. mask_truncated: those cut at the longest length do not count."""
    lengths = torch.tensor([len(one.completion.ids) for one in scored])
    T = int(lengths.max())
    ids = torch.tensor([one.completion.ids + [0] * (T - len(one.completion.ids)) for one in scored])
    logps = torch.tensor([one.completion.logps + [0.0] * (T - len(one.completion.logps)) for one in scored])
    counts = torch.tensor([not mask_truncated or one.completion.finish_reason == "stop" for one in scored])
    mask = (torch.arange(T) < lengths[:, None]) & counts[:, None]
    return Rollout(torch.tensor([one.prompt for one in scored]), ids, lengths, mask.long(), logps, advantages)


def rollout_logps(
    model: Decoder, rollout: Rollout, rows: Sequence[int], prompts: Sequence[Prompt], *, temperature: float
) -> tuple[Tensor, Tensor]:
    """completion_logps of these completions: (len(rows), T) log-probabilities and entropies; 0 where not counted."""
    ids, lengths = rollout.ids.tolist(), rollout.lengths.tolist()
    shared = share_prompts(
        [prompts[int(rollout.prompts[i])].ids for i in rows], [ids[i][: lengths[i]] for i in rows], rollout.ids.shape[1]
    )
    index = torch.tensor(rows)
    return completion_logps(model, shared, rollout.ids[index], rollout.completion_mask[index], temperature=temperature)


def describe(scored: Sequence[Scored], num_generations: int, prefix: str = "") -> dict[str, float | None]:
    """Rewards and lengths of a batch of rollouts, for metrics.jsonl (docs/metrics.md)."""
    groups = [scored[start : start + num_generations] for start in range(0, len(scored), num_generations)]
    lengths = [len(one.completion.ids) for one in scored]
    dull = sum(not has_spread(group) for group in groups) / len(groups)
    row = _mean_and_std([one.reward for one in scored], f"{prefix}reward", f"{prefix}reward_std")
    for name in scored[0].rewards:
        values = [math.nan if (value := one.rewards[name]) is None else value for one in scored]
        row |= _mean_and_std(values, f"{prefix}rewards/{name}/mean", f"{prefix}rewards/{name}/std")
    return row | {
        f"{prefix}frac_reward_zero_std": dull,
        f"{prefix}completions/mean_length": statistics.fmean(lengths),
        f"{prefix}completions/min_length": min(lengths),
        f"{prefix}completions/max_length": max(lengths),
        f"{prefix}completions/clipped_ratio": sum(s.completion.finish_reason != "stop" for s in scored) / len(scored),
    }


def _mean_and_std(values: Sequence[float], mean: str, std: str) -> dict[str, float | None]:
    """Of the values that are there; None where there are too few."""
    known = [value for value in values if not math.isnan(value)]
    return {
        mean: statistics.fmean(known) if known else None,
        std: statistics.stdev(known) if len(known) > 1 else None,
    }
