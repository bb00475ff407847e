"""linear_cross_entropy: the last layer and its loss together, so that no (M, V) tensor of logits exists.

    z   = softcap(x · Wᵀ + …) / τ                 logits of a row, fp32; softcap(z) = c · tanh(z / c)
    nll = -log softmax(z)[target]
    H   = -Σ_v p_v log p_v                        entropy of p = softmax(z), on request, without a gradient
    dz  = dnll · (p - onehot(target))

    M rows, D hidden size, V vocabulary

At V = 49,152 the logits of 1,024 tokens are 201 MB in fp32, and their gradient is as much again. Under a head that is
nothing but a dense weight vocabulary_tiles.py takes a tile of words at a time; else rows go through here in chunks of
40 MiB. A row's nll depends on its own x alone, so under a frozen head, as LoRA has it, the gradient for dnll = 1 is
taken while the logits are there: (M, D) is kept, and backward multiplies it by dnll. A head that is trained wants
Σ dz · x over all rows, for which dnll must be known: backward computes logits again, which makes four products of
torch's three.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant import QuantizedTensor

from . import vocabulary_tiles
from .dispatch import backend_for, captured_backend, implementation, register
from .lora_matmul import LoRATerm, lora_matmul

CHUNK_BYTES = 5 << 23  # what a chunk's logits may take: in larger chunks the head is read less often


class Head(NamedTuple):
    """The output layer as it is at the time of the call."""

    weight: Tensor | QuantizedTensor
    """(V, D)"""
    adapters: tuple[LoRATerm, ...] = ()
    bias: Tensor | None = None
    """(V,)"""


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor | QuantizedTensor | Head,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
) -> Any:
    """Per-token negative log-likelihood, fp32 (M,); 0 where targets is ignore_index. With return_entropy (nll, H).

    hidden (M, D), targets int64 (M,). Differentiable in hidden and in every tensor of the head that requires a
    gradient. Raises ValueError for shapes that do not fit, a target outside the vocabulary, a temperature or
    softcap that is not positive, or an adapter of the head with an input of its own.
    """
    head = head if isinstance(head, Head) else Head(head)
    V, D = head.weight.shape
    if hidden.ndim != 2 or hidden.shape[1] != D or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy needs hidden (M, {D}) and targets (M,), "
            f"got {tuple(hidden.shape)} and {tuple(targets.shape)}"
        )
    if any(term.x is not None for term in head.adapters):
        raise ValueError(
            "a head's adapters take the hidden states as they are: a term with its own x (dropout) cannot be"
        )
    for name, value in (("temperature", temperature), ("softcap", softcap)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive, got {value}")
    rows = (targets != ignore_index).nonzero().view(-1)
    counted = targets[rows]
    if len(rows) and (counted.min() < 0 or counted.max() >= V):
        raise ValueError(
            f"targets must lie in [0, {V}) or be {ignore_index}, got {int(counted.min())} … {int(counted.max())}"
        )
    run = implementation("linear_cross_entropy", backend_for("linear_cross_entropy", hidden.device))
    nll, entropy = run(hidden[rows], head, counted, temperature, softcap, return_entropy)
    zeros = torch.zeros(len(targets), dtype=nll.dtype, device=nll.device)
    nll = zeros.index_put((rows,), nll)
    return (nll, zeros.index_put((rows,), entropy)) if return_entropy else nll


@register("linear_cross_entropy", "reference")
def linear_cross_entropy_reference(
    hidden: Tensor, head: Head, targets: Tensor, temperature: float, softcap: float | None, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    options = _Options(head, temperature, softcap, with_entropy)
    if vocabulary_tiles.serves(hidden, head, softcap):
        return _UnderDenseHead.apply(hidden, targets, options, head.weight)
    return _LinearCrossEntropy.apply(hidden, targets, options, *_head_tensors(head))


class _Options(NamedTuple):
    head: Head
    temperature: float
    softcap: float | None
    with_entropy: bool


def _head_tensors(head: Head) -> list[Tensor]:
    """The tensors of the head that may want a gradient, in a fixed order. autograd sees only a function's arguments."""
    dense = [t for t in (head.weight, head.bias) if isinstance(t, Tensor)]
    return dense + [t for term in head.adapters for t in (term.A, term.B)]


def _with_tensors(head: Head, tensors: Sequence[Tensor]) -> Head:
    """The same head with `_head_tensors` replaced."""
    rest = list(tensors)
    weight = rest.pop(0) if isinstance(head.weight, Tensor) else head.weight
    bias = None if head.bias is None else rest.pop(0)
    adapters = tuple(LoRATerm(rest.pop(0), rest.pop(0), term.scaling) for term in head.adapters)
    return Head(weight, adapters, bias)


def _logits(hidden: Tensor, head: Head, options: _Options) -> Tensor:
    """(m, D) → fp32 (m, V), after softcap and temperature."""
    z = lora_matmul(hidden, head.weight, head.adapters, bias=head.bias)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if options.softcap is not None:
        z = options.softcap * torch.tanh(z / options.softcap)
    return z if options.temperature == 1.0 else z / options.temperature


def _chunks(n_rows: int, V: int) -> list[slice]:
    return vocabulary_tiles.row_blocks(n_rows, max(1, CHUNK_BYTES // (4 * V)))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, options: _Options, *head_tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.options, ctx.backend = options, captured_backend()
        wide = torch.promote_types(hidden.dtype, torch.float32)
        nll = torch.empty(len(targets), dtype=wide, device=hidden.device)
        entropy = torch.zeros_like(nll)
        ctx.head_is_frozen = ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[3:])
        slope = _wide_zeros(hidden) if ctx.head_is_frozen else None
        for rows in _chunks(len(targets), options.head.weight.shape[0]):
            x = hidden[rows].detach().requires_grad_(ctx.head_is_frozen)
            with torch.set_grad_enabled(ctx.head_is_frozen):
                z = _logits(x, options.head, options)
            logps = torch.log_softmax(z.detach(), dim=1)
            nll[rows] = -logps.gather(1, targets[rows, None]).view(-1)
            if options.with_entropy:
                entropy[rows] = -(logps.exp() * logps).sum(dim=1)
            if slope is not None:
                slope[rows] = torch.autograd.grad(z, x, _minus_onehot(logps.exp_(), targets[rows]))[0]
        if slope is None:
            ctx.save_for_backward(hidden, targets, *head_tensors)
        else:
            ctx.save_for_backward(slope)
            ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(entropy)
        return nll, entropy

    @staticmethod
    def backward(ctx: Any, dnll: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.head_is_frozen:
            (slope,) = ctx.saved_tensors
            return (dnll[:, None] * slope).to(ctx.dtype), None, None, *[None] * len(ctx.needs_input_grad[3:])
        hidden, targets, *head_tensors = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]]
        sources = [hidden, *head_tensors]
        totals = [_wide_zeros(t) if want else None for t, want in zip(sources, wanted, strict=True)]
        for rows in _chunks(len(targets), ctx.options.head.weight.shape[0]):
            leaves = [t.detach().requires_grad_(want) for t, want in zip(sources, wanted, strict=True)]
            leaves[0] = hidden[rows].detach().requires_grad_(wanted[0])
            with torch.enable_grad(), ctx.backend():
                z = _logits(leaves[0], _with_tensors(ctx.options.head, leaves[1:]), ctx.options)
            dz = _minus_onehot(torch.softmax(z.detach(), dim=1), targets[rows]).mul_(dnll[rows, None])
            grads = iter(torch.autograd.grad(z, [leaf for leaf in leaves if leaf.requires_grad], dz))
            for i, total in enumerate(totals):
                if total is not None:
                    (total[rows] if i == 0 else total).add_(next(grads))
        grads_out = [None if t is None else t.to(s.dtype) for t, s in zip(totals, sources, strict=True)]
        return grads_out[0], None, None, *grads_out[1:]


class _UnderDenseHead(torch.autograd.Function):
    """The same by vocabulary_tiles.py."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, options: _Options, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.temperature, ctx.backend, ctx.dtype = options.temperature, captured_backend(), hidden.dtype
        ctx.head_is_frozen = ctx.needs_input_grad[0] and not ctx.needs_input_grad[3]
        wanted = (options.temperature, options.with_entropy, ctx.head_is_frozen)
        found = vocabulary_tiles.losses(hidden, weight, targets, *wanted)
        if ctx.head_is_frozen:
            ctx.save_for_backward(found.slope)
        else:
            ctx.save_for_backward(hidden, weight, targets, found.m, found.log_total)
        ctx.mark_non_differentiable(found.entropy)
        return found.nll, found.entropy

    @staticmethod
    def backward(ctx: Any, dnll: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.head_is_frozen:
            return (dnll[:, None] * ctx.saved_tensors[0]).to(ctx.dtype), None, None, None
        hidden, weight, targets, *sums = ctx.saved_tensors
        with ctx.backend():
            options = (ctx.temperature, ctx.needs_input_grad[0])
            dx, dW = vocabulary_tiles.gradients(hidden, weight, targets, sums, dnll, *options)
        return dx, None, None, dW


def _minus_onehot(p: Tensor, targets: Tensor) -> Tensor:
    """p (m, V) with 1 taken from each row's target, in place."""
    p[torch.arange(len(p), device=p.device), targets] -= 1
    return p


def _wide_zeros(like: Tensor) -> Tensor:
    """What the chunks' gradients are summed in: fp32 at least, or small chunks would be lost in a bf16 total."""
    return torch.zeros(like.shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
