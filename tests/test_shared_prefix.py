"""models/: documents that share their beginning give what each gives alone behind its own copy of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from kernels.cpu import library
from models import Decoder
from tests.accuracy import assert_as_accurate_as
from tests.small_llama import EVERY, small_decoder

PROMPT, ENDS = 7, (1, 9, 4)


def shared_row(ids: Tensor, ends: list[Tensor]) -> dict[str, Tensor]:
    """One row: the prompt, then each end."""
    segments = [1] * len(ids) + [2 + i for i, end in enumerate(ends) for _ in end]
    prefixes = [0] * len(ids) + [1 for end in ends for _ in end]
    positions = list(range(len(ids))) + [len(ids) + t for end in ends for t in range(len(end))]
    named = {"segment_ids": segments, "prefix_ids": prefixes, "position_ids": positions}
    return {"input_ids": torch.cat([ids, *ends])[None]} | {name: torch.tensor([x]) for name, x in named.items()}


@pytest.mark.parametrize(
    ("setting", "checkpointing"), [*((name, False) for name in EVERY), ("grouped", True), ("mistral", True)]
)
def test_a_shared_beginning_gives_the_logits_and_gradients_of_copies(setting: str, checkpointing: bool) -> None:
    """Windows shorter than the prompt among them, and documents of one token."""
    model = small_decoder(**EVERY[setting]).double()
    model.gradient_checkpointing = checkpointing
    prompt = torch.randint(0, 96, (PROMPT,))
    ends = [torch.randint(0, 96, (n,)) for n in ENDS]
    weights = [torch.randn(n, 96, dtype=torch.float64) for n in ENDS]

    def gradients(logits: list[Tensor]) -> list[Tensor]:
        loss = sum((z.double() * w).sum() for z, w in zip(logits, weights, strict=True))
        return list(torch.autograd.grad(loss, list(model.parameters())))  # type: ignore[arg-type]

    shared = model(**shared_row(prompt, ends))[0, PROMPT:].split(list(ENDS))
    alone = [model(torch.cat([prompt, end])[None])[0, PROMPT:] for end in ends]
    eps = torch.finfo(torch.float32).eps  # logits and norms are fp32
    for a, b in zip(shared, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=64 * eps * b.abs().max().item())
    together, apart = gradients(list(shared)), gradients(alone)
    largest = max(b.norm() for b in apart)  # a gradient of 0 is no scale: of q and k under a window of one
    for a, b in zip(together, apart, strict=True):
        assert (a - b).norm() <= 64 * eps * (b.norm() if b.norm() > 1e-6 * largest else largest)


@pytest.mark.skipif(library.why_missing() is not None, reason=str(library.why_missing()))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_shared_beginning_through_the_kernel(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 one call of the kernel takes the row: as accurate as document by document, and nothing else is called."""
    model = small_decoder(head_dim=32)
    model.gradient_checkpointing = checkpointing
    row = shared_row(torch.randint(0, 96, (PROMPT,)), [torch.randint(0, 96, (n,)) for n in ENDS])

    def logits_and_gradients(model: Decoder) -> list[Tensor]:
        logits = model(**row)
        gradients = torch.autograd.grad(logits.double().square().mean(), list(model.parameters()))  # type: ignore[arg-type]
        return [logits.detach(), torch.cat([g.flatten() for g in gradients])]

    exact = logits_and_gradients(copy.deepcopy(model).double())
    with kernels.use_backend("reference"):
        apart = logits_and_gradients(model)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # for more, its few documents would be left to torch
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    for a, b, wide in zip(logits_and_gradients(model), apart, exact, strict=True):
        assert_as_accurate_as(b, a, wide.double())


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [
        ([0, 0, 3, 3, 0], "got 3 at row 0, column 2"),
        ([0, 0, 1, 1, 2], "without a prefix, got 2 at row 0, column 4"),
        ([0, 0, 9, 9, 0], "got 9 at row 0, column 2"),
        ([1, 1, 0, 0, 0], "got 1 at row 0, column 0"),
    ],
)
def test_a_prefix_is_an_earlier_document_without_one(prefixes: list[int], message: str) -> None:
    ids, segments = torch.zeros(1, 5, dtype=torch.int64), torch.tensor([[1, 1, 2, 2, 3]])
    with pytest.raises(ValueError, match=message):
        small_decoder()(ids, segment_ids=segments, prefix_ids=torch.tensor([prefixes]))


def test_prefixes_need_documents() -> None:
    ids = torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="prefix_ids need segment_ids with several documents"):
        small_decoder()(ids, prefix_ids=torch.zeros_like(ids))
