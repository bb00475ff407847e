"""A group in one forward: the prompt once, its completions behind it, and the log-probabilities of their tokens.

    row          p₁ … p_P  a₁ … a_{L-1}  b₁ … b_{K-1}  …         one row, no padding
    segments      1 …  1    2 …  2        3 …  3                  a and b attend to the prompt and to themselves
    positions     0 … P-1   P … P+L-2     P … P+K-2               as if each stood right behind the prompt

The token before a₁ and b₁ is p_P, which predicts both; the last token of a completion predicts nothing and is left out.
So G completions of L tokens behind P cost P + G·(L - 1) positions and not G·(P + L), and the head sees the positions
that predict a counted token and no others. The gradient is that of separate rows, summed.

    n completions, T tokens of the longest, S positions of the row, D hidden size
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import linear_cross_entropy
from models import Decoder


class SharedRow(NamedTuple):
    """What the decoder takes, each int64 (1, S), and where the n completions are predicted."""

    input_ids: Tensor
    segment_ids: Tensor
    position_ids: Tensor
    prefix_ids: Tensor | None
    """None where there is one document alone"""
    predictors: Tensor
    """(n, T): the position that predicts token t of completion i; 0 behind its end"""


def share_prompts(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], width: int) -> SharedRow:
    """prompts[i] is the prompt of completions[i]; neighbours with equal prompts share it. width: T."""
    ids: list[int] = []
    segments: list[int] = []
    positions: list[int] = []
    prefixes: list[int] = []
    predictors = torch.zeros(len(completions), width, dtype=torch.int64)

    def add(tokens: Sequence[int], first_position: int, prefix: int) -> None:
        segment = segments[-1] + 1 if segments else 1
        ids.extend(tokens)
        segments.extend([segment] * len(tokens))
        positions.extend(range(first_position, first_position + len(tokens)))
        prefixes.extend([prefix] * len(tokens))

    for _, group in groupby(range(len(completions)), key=lambda i: tuple(prompts[i])):
        members = list(group)
        prompt = prompts[members[0]]
        add(prompt, 0, 0)
        last, prefix = len(ids) - 1, segments[-1]
        for i in members:
            L = len(completions[i])
            predictors[i, :L] = torch.tensor([last, *range(len(ids), len(ids) + L - 1)])
            add(completions[i][:-1], len(prompt), prefix)
    input_ids, segment_ids, position_ids, prefix_ids = (torch.tensor([x]) for x in (ids, segments, positions, prefixes))
    return SharedRow(input_ids, segment_ids, position_ids, prefix_ids if segments[-1] > 1 else None, predictors)


def completion_logps(
    model: Decoder, row: SharedRow, ids: Tensor, completion_mask: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """log p of each counted token under softmax(logits / temperature), and the entropy there: fp32 (n, T), 0 elsewhere.

    ids, completion_mask: (n, T). The entropy has no gradient.
    """
    hidden = model(
        row.input_ids,
        segment_ids=row.segment_ids,
        position_ids=row.position_ids,
        prefix_ids=row.prefix_ids,
        return_hidden=True,
    )[0]
    counted = completion_mask != 0
    nll, entropy = linear_cross_entropy(
        hidden[row.predictors[counted]], model.head(), ids[counted], temperature=temperature, return_entropy=True
    )
    empty = nll.new_zeros(ids.shape)
    return empty.masked_scatter(counted, -nll), empty.masked_scatter(counted, entropy)
