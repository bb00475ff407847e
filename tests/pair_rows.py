"""Pairs of unequal lengths for the tiny base, and windows over them."""

from collections.abc import Sequence
from pathlib import Path

import torch

from data.preference import EncodedPair, encode_pairs
from data.schema import detect
from models import load_tokenizer

PAIRS = [
    {"prompt": f"Say the number {i}" + " please" * (i % 3), "chosen": f"It is {i}" + ", sir" * (i % 3) + ".",
     "rejected": f"It is {i}" + " and more" * (i % 4 + 1)}
    for i in range(24)
]  # fmt: skip


def encoded(base: Path, n: int = 8) -> tuple[list[EncodedPair], int]:
    """The first n pairs, and the pad id."""
    tokenizer = load_tokenizer(base)
    pairs = encode_pairs(tokenizer, PAIRS[:n], detect(PAIRS, "p"), max_seq_length=200, path="p").pairs
    return pairs, tokenizer.pad_id


def moved(parameters: Sequence[tuple[str, torch.nn.Parameter]]) -> None:
    """The parameters a step away from where they start, so that policy and reference differ."""
    with torch.no_grad():
        for _, parameter in parameters:
            parameter.add_(0.05 * torch.randn_like(parameter))
