"""linear_distill: the output layers of student and teacher and how far they are apart, so that no (M, V) tensor exists.

    z = x_S · W_Sᵀ + …,  u = x_T · W_Tᵀ + …          logits of a row, fp32
    D = divergence of softmax(z / τ) from softmax(u / τ)                                  (divergence.py)
    loss = (1 - w) · D + w · nll                     nll = -log softmax(z)[target]        w is `ce_weight`

    M rows, V vocabulary, D hidden size (the student's and the teacher's may differ)

Rows go through in chunks that hold the logits of both. As in linear_cross_entropy.py: a row's loss depends on its own x
alone, so under a frozen head the gradient is taken in forward, while the chunk's logits are there, and backward
multiplies it by dloss; a head that is trained has the logits of both, a chunk at a time, once more in backward.

Vocabularies of equal tokens may be padded to unequal sizes (Qwen2.5's are): the columns that both have are compared.
There is no gradient for the teacher. Left out: a softcap, which no family here has.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant import QuantizedTensor

from .dispatch import captured_backend
from .divergence import TopK, check_mix, divergence_and_slope, spread, student_outcomes, teacher_outcomes
from .linear_cross_entropy import Head, _chunks, _head_tensors, _wide_zeros, _with_tensors
from .lora_matmul import lora_matmul


class Distilled(NamedTuple):
    """What came of each row, fp32 (M,)."""

    loss: Tensor
    """(1 - w) · D + w · nll; the one that is differentiable"""
    divergence: Tensor
    nll: Tensor
    """0 without targets"""


def linear_distill(
    student_hidden: Tensor,
    student_head: Tensor | QuantizedTensor | Head,
    teacher: Tensor | TopK,
    teacher_head: Tensor | QuantizedTensor | Head | None = None,
    *,
    targets: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    ce_weight: float | Tensor = 0.0,
) -> Distilled:
    """Every row's loss. Differentiable in student_hidden and in every tensor of student_head that requires a gradient.

    student_hidden (M, D). teacher: its hidden states (M, D_T), with teacher_head; or TopK, without. targets int64 (M,).
    ce_weight: a number, or one for each row (M,). Raises ValueError for shapes that do not fit, a token outside the
    shared vocabulary, beta or ce_weight outside [0, 1], or a temperature that is not positive.
    """
    check_mix(beta, temperature)
    head = _as_head(student_head)
    other = None if teacher_head is None else _as_head(teacher_head)
    V = head.weight.shape[0] if other is None else min(head.weight.shape[0], other.weight.shape[0])
    _check_shapes(student_hidden, head, teacher, other)
    wide = torch.promote_types(student_hidden.dtype, torch.float32)
    weights = torch.as_tensor(ce_weight, dtype=wide, device=student_hidden.device).expand(len(student_hidden))
    if len(weights) and not 0 <= weights.min() <= weights.max() <= 1:
        raise ValueError(f"ce_weight must lie in [0, 1], got {weights.min():g} … {weights.max():g}")
    if targets is None and weights.any():
        raise ValueError("a ce_weight above 0 needs targets")
    for name, ids in (("targets", targets), ("the teacher's ids", teacher.ids if isinstance(teacher, TopK) else None)):
        if ids is not None and ids.numel() and (ids.min() < 0 or ids.max() >= V):
            raise ValueError(f"{name} must lie in [0, {V}), got {int(ids.min())} … {int(ids.max())}")
    options = _Options(head, teacher, other, targets, beta, temperature, weights, V)
    return Distilled(*_LinearDistill.apply(student_hidden, options, *_head_tensors(head)))


@torch.no_grad()
def linear_top_k(hidden: Tensor, head: Tensor | QuantizedTensor | Head, k: int, *, temperature: float = 1.0) -> TopK:
    """The k likeliest tokens of each row, int32, with log softmax(z / τ), fp32: most likely first. hidden (M, D).

    Raises ValueError for a k outside the vocabulary and a temperature that is not positive.
    """
    check_mix(0, temperature)
    head = _as_head(head)
    V = head.weight.shape[0]
    if not 1 <= k <= V:
        raise ValueError(f"k must lie between 1 and the vocabulary's {V}, got {k}")
    ids = torch.empty(len(hidden), k, dtype=torch.int32, device=hidden.device)
    logps = torch.empty(len(hidden), k, device=hidden.device)
    for rows in _chunks(len(hidden), V):
        values, tokens = torch.topk(_log_softmax(_logits(hidden[rows], head, V), temperature), k, dim=1)
        ids[rows], logps[rows] = tokens.int(), values
    return TopK(ids, logps)


class _Options(NamedTuple):
    head: Head
    teacher: Tensor | TopK
    teacher_head: Head | None
    targets: Tensor | None
    beta: float
    temperature: float
    ce_weight: Tensor
    """(M,)"""
    V: int
    """tokens that both vocabularies have"""


class _LinearDistill(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, options: _Options, *head_tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.options, ctx.backend = options, captured_backend()
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss, apart, nll = torch.zeros(3, len(hidden), dtype=wide, device=hidden.device)
        ctx.head_is_frozen = ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[2:])
        slope = _wide_zeros(hidden) if ctx.head_is_frozen else None
        for rows in _row_chunks(options, len(hidden)):
            x = hidden[rows].detach().requires_grad_(ctx.head_is_frozen)
            with torch.set_grad_enabled(ctx.head_is_frozen):
                z = _logits(x, options.head, options.V)
            loss[rows], apart[rows], nll[rows], dz = _losses(z.detach(), rows, options)
            if slope is not None:
                slope[rows] = torch.autograd.grad(z, x, dz)[0]
        if slope is None:
            ctx.save_for_backward(hidden, *head_tensors)
        else:
            ctx.save_for_backward(slope)
            ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(apart, nll)
        return loss, apart, nll

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.head_is_frozen:
            (slope,) = ctx.saved_tensors
            return (dloss[:, None] * slope).to(ctx.dtype), None, *[None] * len(ctx.needs_input_grad[2:])
        hidden, *head_tensors = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]]
        sources = [hidden, *head_tensors]
        totals = [_wide_zeros(t) if want else None for t, want in zip(sources, wanted, strict=True)]
        for rows in _row_chunks(ctx.options, len(hidden)):
            leaves = [t.detach().requires_grad_(want) for t, want in zip(sources, wanted, strict=True)]
            leaves[0] = hidden[rows].detach().requires_grad_(wanted[0])
            with ctx.backend():
                with torch.enable_grad():
                    z = _logits(leaves[0], _with_tensors(ctx.options.head, leaves[1:]), ctx.options.V)
                dz = _losses(z.detach(), rows, ctx.options)[3].mul_(dloss[rows, None])
            grads = iter(torch.autograd.grad(z, [leaf for leaf in leaves if leaf.requires_grad], dz))
            for i, total in enumerate(totals):
                if total is not None:
                    (total[rows] if i == 0 else total).add_(next(grads))
        grads_out = [None if t is None else t.to(s.dtype) for t, s in zip(totals, sources, strict=True)]
        return grads_out[0], None, *grads_out[1:]


@torch.no_grad()
def _losses(z: Tensor, rows: slice, options: _Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A chunk's (loss, D, nll) (m,), and the gradient of the loss by z (m, V)."""
    beta, temperature, w = options.beta, options.temperature, options.ce_weight[rows]
    s = _log_softmax(z, temperature)
    if isinstance(options.teacher, TopK):
        ids = options.teacher.ids[rows].long()
        t = teacher_outcomes(options.teacher.logps[rows].to(s.dtype), options.V)
        apart, slope = divergence_and_slope(student_outcomes(s, ids), t, beta)
        dz = spread(slope, s, ids)
    else:
        assert options.teacher_head is not None
        u = _logits(options.teacher[rows], options.teacher_head, options.V).to(s.dtype)
        apart, dz = divergence_and_slope(s, _log_softmax(u, temperature), beta)
    dz.mul_((1 - w)[:, None] / temperature)
    if options.targets is None:
        return (1 - w) * apart, apart, torch.zeros_like(apart), dz
    targets = options.targets[rows, None]
    logps = s if temperature == 1.0 else torch.log_softmax(z, dim=1)
    nll = -logps.gather(1, targets)[:, 0]
    if w.any():
        dz.addcmul_(logps.exp(), w[:, None]).scatter_add_(1, targets, -w[:, None].to(dz.dtype))
    return (1 - w) * apart + w * nll, apart, nll, dz


def _logits(hidden: Tensor, head: Head, V: int) -> Tensor:
    """(m, D) → the first V logits, fp32 (m, V)."""
    z = lora_matmul(hidden, head.weight, head.adapters, bias=head.bias)[:, :V]
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _log_softmax(z: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(z if temperature == 1.0 else z / temperature, dim=1)


def _row_chunks(options: _Options, n_rows: int) -> list[slice]:
    both = options.head.weight.shape[0] + (0 if options.teacher_head is None else options.teacher_head.weight.shape[0])
    return _chunks(n_rows, both)


def _as_head(head: Tensor | QuantizedTensor | Head) -> Head:
    head = head if isinstance(head, Head) else Head(head)
    if any(term.x is not None for term in head.adapters):
        raise ValueError(
            "a head's adapters take the hidden states as they are: a term with its own x (dropout) cannot be"
        )
    return head


def _check_shapes(hidden: Tensor, head: Head, teacher: Tensor | TopK, teacher_head: Head | None) -> None:
    D = head.weight.shape[1]
    if hidden.ndim != 2 or hidden.shape[1] != D:
        raise ValueError(f"linear_distill needs student_hidden (M, {D}), got {tuple(hidden.shape)}")
    if isinstance(teacher, TopK) != (teacher_head is None):
        raise ValueError("a teacher is hidden states with a teacher_head, or TopK without one")
    M = len(hidden)
    if isinstance(teacher, TopK):
        if teacher.ids.ndim != 2 or teacher.ids.shape != teacher.logps.shape or len(teacher.ids) != M:
            found = f"{tuple(teacher.ids.shape)} and {tuple(teacher.logps.shape)}"
            raise ValueError(f"TopK needs ids and logps ({M}, k), got {found}")
    elif teacher_head is not None and teacher.shape != (M, teacher_head.weight.shape[1]):
        wanted = (M, teacher_head.weight.shape[1])
        raise ValueError(f"linear_distill needs the teacher's hidden states {wanted}, got {tuple(teacher.shape)}")
