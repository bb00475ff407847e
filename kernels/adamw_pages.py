"""adamw_pages: one AdamW step on state that lies in pages, most of them in a file, in one call.

For each page: bring it (read it, or fill it with zeros, or find it there), do the step of kernels/adamw.py on its
spans, write it back unless it stays. The pages have nothing to do with each other, so several threads take a page each;
no bit depends on how many. Backend "cpu" alone has it: elsewhere the table of optim/pages.py walks its pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from .adamw import AdamWStep
from .dispatch import backend_for, implementation


class Comes(IntEnum):
    """How a page comes into its frame."""

    THERE = 0
    NEW = 1
    READ = 2


class Stage(IntEnum):
    """How far a visit got before a transfer failed, here or in another page."""

    NOT_BEGUN = 0
    BEGUN = 1
    WORKED = 2
    GONE = 3


@dataclass(frozen=True)
class PageSpan:
    """Elements start … stop - 1 of a parameter p with the gradient g, both (numel,); `offsets`: bytes into the page at
    which each field of their state begins, two of them or, with 8 bits, four."""

    p: Tensor
    g: Tensor
    start: int
    stop: int
    offsets: tuple[int, ...]
    step: AdamWStep


@dataclass
class Visit:
    """A page of `used` bytes, at byte `place` of the file. frame: uint8 (at least used,), or None for one of those that
    pages pass through, whose number is then in `passed`. seconds: that it took to move."""

    page: int
    used: int
    place: int
    frame: Tensor | None
    comes: Comes
    goes: bool
    stage: Stage = Stage.NOT_BEGUN
    passed: int | None = None
    seconds: float = 0.0


def serves_pages(parameters: Sequence[Tensor]) -> bool:
    """Whether there is a call for the pages of these parameters, with gradients of their dtype, now."""
    dtypes = {parameter.dtype for parameter in parameters} | {
        parameter.grad.dtype for parameter in parameters if parameter.grad is not None
    }
    served = dtypes <= {torch.float32, torch.bfloat16, torch.float16}
    return served and all(backend_for("adamw", parameter.device) == "cpu" for parameter in parameters[:1])


def adamw_pages(
    visits: Sequence[Visit], spans: Sequence[Sequence[PageSpan]], file: int, frames: Sequence[Tensor]
) -> int:
    """Do the visits, spans[i] in visits[i], in as many threads as there are frames to pass through. file: a descriptor.

    Returns 0, or the errno of the transfer that failed; each visit's `stage` says what is done.
    """
    return int(implementation("adamw_pages", "cpu")(visits, spans, file, frames))
