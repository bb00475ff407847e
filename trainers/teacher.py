"""A teacher: a frozen model in memory here, or its cached predictions (teacher_cache.py).

Either gives, for a batch's learnt tokens in order, what kernels.linear_distill takes. Teacher and student must mean the
same tokens by the same ids, or a divergence over ids would compare strangers: every token is compared, not the sizes.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from data.batch import Batch
from kernels import Head, TopK
from lora import load_adapter
from models import Decoder, Tokenizer, load_model

from .distill_config import DistillConfig

Split = Literal["train", "eval"]


class Teacher(Protocol):
    def predictions(self, split: Split, batch: Batch, numbers: Sequence[int]) -> tuple[Tensor | TopK, Head | None]:
        """For the learnt tokens of the batch, which holds the examples `numbers` of the split one after the other."""


class LoadedTeacher:
    """A model in memory. It sees the batch itself, so that the numbers of its examples do not matter."""

    def __init__(self, model: Decoder) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def predictions(self, split: Split, batch: Batch, numbers: Sequence[int]) -> tuple[Tensor | TopK, Head | None]:
        """(hidden states (M, D), head)."""
        hidden = self.model(batch.input_ids, segment_ids=batch.segment_ids, return_hidden=True)[:, :-1]
        return hidden[learnt(batch)], self.model.head()


def learnt(batch: Batch) -> Tensor:
    """Where the next token is learnt: bool (B, T-1), position t for token t+1."""
    return batch.completion_mask[:, 1:] != 0


def load_teacher(config: DistillConfig) -> LoadedTeacher:
    """The teacher that the flags describe. Raises ValueError for what cannot be loaded."""
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    quantize = None if config.teacher_quantize == "none" else config.teacher_quantize
    model = load_model(config.teacher, dtype=dtype, quantize=quantize)
    if config.teacher_adapter is not None:
        load_adapter(model, config.teacher_adapter)
    return LoadedTeacher(model)


def check_vocabularies(student: Tokenizer, teacher: Tokenizer, names: tuple[str, str]) -> None:
    """Raises ValueError, naming the first token, where the two do not give every token the same id."""
    ours, theirs = student.vocabulary(), teacher.vocabulary()
    different = sorted((id, token) for token, id in ours.items() if theirs.get(token) != id)
    different = different or sorted((id, token) for token, id in theirs.items() if token not in ours)
    if different:
        token = different[0][1]
        ids = (f"id {found[token]}" if token in found else "missing" for found in (ours, theirs))
        said = " and ".join(f"{id} in {name}" for id, name in zip(ids, names, strict=True))
        raise ValueError(
            f"student and teacher need one vocabulary ({len(ours):,} and {len(theirs):,} tokens): {token!r} is {said}"
        )
