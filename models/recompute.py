"""recomputed: keep how a tensor was made, not the tensor.

A layer's matrices save their input for backward: q, k and v the normed x, the down projection silu(a) ⊙ b. Those inputs
are cheap functions of tensors that are kept anyway. Inside `recomputed(h, make)` whatever would save h for backward
saves `make` instead; backward calls it once and drops the result after the last use, each backward that there is.

    with recomputed(h, lambda: rms_norm(x, g, eps)):
        y = q_proj(h)

Gradient checkpointing (torch.utils.checkpoint) is the same bargain for whole layers, matrix products included; this
one costs no product. Both work through torch.autograd.graph.saved_tensors_hooks.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Recipe:
    """Makes a tensor again when the first of its users asks, and forgets it after the last."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self.make, self.users, self.waiting = make, 0, 0
        self.value: Tensor | None = None

    def take(self) -> Tensor:
        if self.value is None:
            with torch.no_grad():
                self.value = self.make()
            self.waiting = self.users
        value, self.waiting = self.value, self.waiting - 1
        if self.waiting == 0:
            self.value = None
        return value


class _Use(NamedTuple):
    recipe: _Recipe
    shape: torch.Size
    stride: tuple[int, ...]


def recomputed(tensor: Tensor, make: Callable[[], Tensor], *, when: bool = True) -> AbstractContextManager[object]:
    """Context: saving `tensor`, or a view of all of it, for backward saves `make` in its place. Nothing unless `when`.

    tensor is contiguous. make() must give the same values in the same layout, and must not hold `tensor` itself.
    """
    if not when or torch.compiler.is_compiling():  # which decides by itself what its backward makes again
        return nullcontext()
    recipe, address, numel = _Recipe(make), tensor.data_ptr(), tensor.numel()

    def pack(saved: Tensor) -> Tensor | _Use:
        if saved.data_ptr() != address or saved.numel() != numel:
            return saved
        recipe.users += 1
        return _Use(recipe, saved.shape, saved.stride())

    def unpack(kept: Tensor | _Use) -> Tensor:
        return kept.recipe.take().as_strided(kept.shape, kept.stride) if isinstance(kept, _Use) else kept

    return saved_tensors_hooks(pack, unpack)
