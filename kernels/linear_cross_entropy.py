"""linear_cross_entropy: the last layer and its loss together, so that no (M, V) tensor of logits exists.

    z   = softcap(x · Wᵀ + …) / τ                 logits of a row, fp32; softcap(z) = c · tanh(z / c)
    nll = -log softmax(z)[target]
    H   = -Σ_v p_v log p_v                        entropy of p = softmax(z), on request, without a gradient
    dz  = dnll · (p - onehot(target))

    M rows, D hidden size, V vocabulary

Rows go through in chunks. At V = 49,152 the logits of 1,024 tokens are 201 MB in fp32, and their gradient is as much
again; a chunk is 40 MiB. A row's nll depends on its own x alone, so under a frozen head, as LoRA has it, the gradient
for dnll = 1 is taken while the chunk's logits are there: (M, D) is kept, and backward multiplies it by dnll. Where that
head is nothing but a dense weight, one buffer serves all chunks: logits, their softmax and dz are written over one
another. A head that is trained wants Σ dz · x over all rows, for which dnll must be known: backward computes the logits
of a chunk again, which makes four products of torch's three.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant import QuantizedTensor

from .buffers import empty
from .dispatch import asked_backend, backend_for, captured_backend, implementation, register
from .lora_matmul import LoRATerm, lora_matmul
from .matmul import product_in_c

CHUNK_BYTES = 5 << 23  # what a chunk's logits may take: in larger chunks the head is read less often
VOCABULARY_BLOCK = 1024  # columns of the logits a product fills: MKL packs W, and a block of it (2.4 MB) stays in cache
CACHED_ROWS = 8  # rows of logits the softmax passes over at a time, for the same reason


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
    """Of equal size: a short last one would read the whole head for a few rows."""
    most = max(1, CHUNK_BYTES // (4 * V))
    rows = -(-n_rows // -(-n_rows // most)) if n_rows else 1
    return [slice(start, min(start + rows, n_rows)) for start in range(0, n_rows, rows)]


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
        chunks = _chunks(len(targets), options.head.weight.shape[0])
        plain = _plain_weight(options.head, options.softcap, hidden)
        ctx.plain = plain is not None and bool(chunks)
        if plain is not None and chunks:
            buffer = empty((chunks[0].stop, len(plain)), plain.dtype, plain.device)
            for rows in chunks:
                dz = _plain_logits(hidden[rows], plain, buffer)
                _softmax_slope(dz, options, targets[rows], nll[rows], entropy[rows] if options.with_entropy else None)
                if slope is not None:
                    torch.mm(dz, plain, out=slope[rows]).div_(options.temperature)
            chunks = []
        for rows in chunks:
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
        if ctx.plain:
            with ctx.backend():
                dx, dW = _plain_gradients(hidden, head_tensors[0], targets, dnll, ctx.options, ctx.needs_input_grad[0])
            return dx, None, None, dW
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


def _plain_weight(head: Head, softcap: float | None, hidden: Tensor) -> Tensor | None:
    """W, where the logits are nothing but x · Wᵀ / τ, in the dtype they are wanted in."""
    weight, adapters, bias = head
    if not isinstance(weight, Tensor) or adapters or bias is not None or softcap is not None:
        return None
    return weight.detach() if weight.dtype == hidden.dtype in (torch.float32, torch.float64) else None


def _plain_logits(x: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """x · Wᵀ (m, V), in `buffer`."""
    z = buffer[: len(x)]
    if product_in_c(x, weight, out=z) is not None:
        return z
    for start in range(0, len(weight), VOCABULARY_BLOCK):
        block = slice(start, start + VOCABULARY_BLOCK)
        torch.mm(x, weight[block].T, out=z[:, block])
    return z


def _softmax_slope(z: Tensor, options: _Options, targets: Tensor, nll: Tensor, entropy: Tensor | None) -> None:
    """z (m, V) before the temperature → τ · dnll/dz, in place; fills nll (m,), and entropy (m,) if it is wanted."""
    if asked_backend() in ("auto", "cpu"):
        from .cpu import elementwise  # the C kernels are a backend like any other: this file does not need them

        if elementwise.serves_softmax(z):
            return elementwise.softmax_slope(z, options.temperature, targets, nll, entropy)
    for start in range(0, len(z), CACHED_ROWS):
        rows = slice(start, start + CACHED_ROWS)
        p = z[rows].div_(options.temperature)
        shifted = p.sub_(p.amax(dim=1, keepdim=True))
        at_target = shifted.gather(1, targets[rows, None]).view(-1)
        unscaled = None if entropy is None else (shifted.exp() * shifted).sum(dim=1)
        total = shifted.exp_().sum(dim=1)
        nll[rows] = total.log() - at_target
        if entropy is not None and unscaled is not None:
            entropy[rows] = total.log() - unscaled / total
        _minus_onehot(p.div_(total[:, None]), targets[rows])


def _plain_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, dnll: Tensor, options: _Options, want_dx: bool
) -> tuple[Tensor | None, Tensor]:
    """dx = (dz / τ) · W (M, D) if it is wanted, and dW = Σ (dz / τ)ᵀ · x (V, D), each chunk's added by its product."""
    scale = (dnll / options.temperature)[:, None]  # of a row of dz: taken into x and dx, which are narrow
    dx, dW = torch.empty_like(hidden) if want_dx else None, torch.zeros_like(weight)
    chunks = _chunks(len(targets), len(weight))
    buffer = empty((chunks[0].stop, len(weight)), weight.dtype, weight.device)
    for chunk in chunks:
        z = _plain_logits(hidden[chunk], weight, buffer)
        _softmax_slope(z, options, targets[chunk], torch.empty_like(dnll[chunk]), None)
        if dx is not None:
            torch.mm(z, weight, out=dx[chunk]).mul_(scale[chunk])
        dW.addmm_(z.T, hidden[chunk] * scale[chunk])
    return dx, dW


def _minus_onehot(p: Tensor, targets: Tensor) -> Tensor:
    """p (m, V) with 1 taken from each row's target, in place."""
    p[torch.arange(len(p), device=p.device), targets] -= 1
    return p


def _wide_zeros(like: Tensor) -> Tensor:
    """What the chunks' gradients are summed in: fp32 at least, or small chunks would be lost in a bf16 total."""
    return torch.zeros(like.shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
