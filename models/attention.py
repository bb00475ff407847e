"""Rotary positions and causal attention.

    rope       x'_i      = x_i · cos(p·ω_i) - x_{i+Dh/2} · sin(p·ω_i)            i < Dh/2, p the token's position
               x'_{i+Dh/2} = x_{i+Dh/2} · cos(p·ω_i) + x_i · sin(p·ω_i)
               ω_i = theta^(-2i / Dh)                              (RoFormer, arXiv 2104.09864, §3.4.2)
    attention  softmax(q · kᵀ / √Dh + mask) · v                    (Vaswani et al., arXiv 1706.03762, eq. 1)

    B batch, T new tokens, S tokens attended to, H heads, Kv key-value heads, Dh head_dim, W window

The pairs that turn together are (i, i + Dh/2), as in Hugging Face's checkpoints; the paper's are (2i, 2i + 1), and
files that store them so are permuted when read.

A token attends to the tokens of its own document (an equal, non-zero segment id) at positions up to its own; in a
layer with a sliding window (Mistral 7B, arXiv 2310.06825) only to the last W of them, its own position included.
`attention_reference` says so with a mask of T·S booleans. The fast paths hold none. Where a kernel serves
(kernels/attention.py) it takes all documents of all rows in one call. Elsewhere causal attention over a row needs no
mask when the row is one document with padding on its right, since no token looks right; rows that hold several
documents take one call a document (a masked call was measured 9 to 13 times slower). A document longer than W is cut
into chunks of at least W tokens: a chunk attends to itself and to the chunk before it through one mask that all chunks
and layers share, so that no T·T of anything exists. Documents may share their beginning, as the completions of one
prompt do: it is computed once, and each of them attends to it and to itself. What padding attends to is never used, and
left unspecified.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import kernels.attention

from .config import DecoderConfig
from .elementwise import apply_rope as apply_rope
from .rope_config import yarn_scale

SMALLEST_CHUNK = 64
Runs = list[tuple[int, int, int]]
"""(row, start, stop) of every document, in order."""


def rope_frequencies(config: DecoderConfig) -> Tensor:
    """ω, fp32 (Dh/2,), on the CPU."""
    rope = config.rope
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    if rope.rope_type == "llama3":
        return frequencies / llama3_factors(config)
    if rope.rope_type == "yarn":
        ramp = yarn_ramp(config)
        return frequencies / rope.factor * ramp + frequencies * (1 - ramp)
    return frequencies


def rope_scale(config: DecoderConfig) -> float:
    """What cos and sin are multiplied by: with yarn, q and k grow with the context (arXiv 2309.00071)."""
    return yarn_scale(config.rope) if config.rope.rope_type == "yarn" else 1.0


def llama3_factors(config: DecoderConfig) -> Tensor:
    """What Llama 3.1 divides each frequency by: 1 (short wavelength) to `factor` (long). fp32 (Dh/2,).

    factor_i = 1 / ((1 - s) / factor + s),  s = clamp((L / wavelength_i - low) / (high - low), 0, 1)
    where L is original_max_position_embeddings, low and high are low_freq_factor and high_freq_factor.
    """
    rope = config.rope
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    wavelengths = 2 * math.pi * rope.theta**exponents
    turns = rope.original_max_position_embeddings / wavelengths
    s = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return 1 / ((1 - s) / rope.factor + s)


def yarn_ramp(config: DecoderConfig) -> Tensor:
    """How far YaRN stretches each frequency: 0 not at all (it turns often), 1 by the whole factor. fp32 (Dh/2,).

    ramp_i = clamp((i - i_fast) / (i_slow - i_fast), 0, 1)
    where pair i_β turns β times within L = original_max_position_embeddings:  i_β = Dh · ln(L / 2πβ) / (2 · ln theta).
    The ramp is linear in i, as in the code that is in use, and its ends are rounded outwards with `truncate`.
    """
    rope, Dh = config.rope, config.head_dim
    fast, slow = (
        Dh * math.log(rope.original_max_position_embeddings / (2 * math.pi * turns)) / (2 * math.log(rope.theta))
        for turns in (rope.beta_fast, rope.beta_slow)
    )
    if rope.truncate:
        fast, slow = math.floor(fast), math.ceil(slow)
    fast, slow = max(fast, 0), min(slow, Dh - 1)
    width = slow - fast or 0.001  # a step, where the two ends meet
    return ((torch.arange(Dh // 2, dtype=torch.float32, device="cpu") - fast) / width).clamp(0, 1)


def rope_tables(position_ids: Tensor, frequencies: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """scale · cos and scale · sin of p·ω for position_ids (B, T): each fp32 (B, T, 1, Dh/2)."""
    angles = position_ids[:, :, None, None].float() * frequencies
    return angles.cos() * scale, angles.sin() * scale


def allowed_pairs(
    query_positions: Tensor, query_segments: Tensor, positions: Tensor, segments: Tensor, *, window: int | None = None
) -> Tensor:
    """Who may attend to whom: query_* (B, T) and the attended positions, segments (B, S) → bool (B, T, S)."""
    same_document = (query_segments[:, :, None] == segments[:, None, :]) & (segments != 0)[:, None, :]
    distance = query_positions[:, :, None] - positions[:, None, :]
    allowed = same_document & (distance >= 0)
    return allowed if window is None else allowed & (distance < window)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """The definition. q (B, T, H, Dh), k and v (B, S, Kv, Dh), allowed bool (B, T, S) → (B, T, H, Dh).

    A query that may attend to nothing gets zeros.
    """
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    weights = torch.softmax(scores.masked_fill(~allowed[:, None], -torch.inf), dim=-1).nan_to_num()
    return torch.einsum("bhts,bshd->bthd", weights, v)


def document_runs(segment_ids: Tensor) -> Runs | None:
    """The documents of segment_ids (B, T), or None when every row is one document with its padding on the right.

    Raises ValueError for a negative id, or a document that continues after another one or after padding.
    """
    runs: Runs = []
    for row, ids in enumerate(segment_ids.tolist()):
        start = 0
        seen = set()
        for stop in range(1, len(ids) + 1):
            if stop < len(ids) and ids[stop] == ids[start]:
                continue
            if ids[start] < 0 or ids[start] in seen:
                rule = "be at least 0" if ids[start] < 0 else "name each document of a row in one stretch"
                raise ValueError(f"segment_ids must {rule}, got {ids[start]} at row {row}, column {start}")
            if ids[start] != 0:
                seen.add(ids[start])
                runs.append((row, start, stop))
            start = stop
    rows = [row for row, _, _ in runs]
    plain = len(set(rows)) == len(rows) and all(start == 0 for _, start, _ in runs)
    return None if plain else runs


def prefix_runs(runs: Runs, segment_ids: Tensor, prefix_ids: Tensor) -> list[int | None]:
    """For each of these documents, which of them comes before it: None, or its number in `runs`.

    prefix_ids (B, T): 0, or the segment id of an earlier document of the row, which the token's document continues.
    Raises ValueError for a prefix that is not an earlier document, or that has a prefix itself.
    """
    found = {(row, int(segment_ids[row, start])): number for number, (row, start, _) in enumerate(runs)}
    wanted = [int(prefix_ids[row, start]) for row, start, _ in runs]
    prefixes = [found.get((row, prefix)) for (row, _, _), prefix in zip(runs, wanted, strict=True)]
    for number, (prefix, asked) in enumerate(zip(prefixes, wanted, strict=True)):
        if asked and (prefix is None or prefix >= number or wanted[prefix]):
            row, start, _ = runs[number]
            raise ValueError(
                f"prefix_ids must name an earlier document without a prefix, got {asked} at row {row}, column {start}"
            )
    return prefixes


class Band(NamedTuple):
    """A sliding window of W tokens, and the mask of a chunk of C ≥ W of them."""

    window: int
    mask: Tensor
    """(C, 2·C): what to add to the scores of a chunk over the chunk before it and itself"""


def band(window: int, *, chunk: int | None = None, dtype: torch.dtype, device: torch.device | str = "cpu") -> Band:
    """The Band of a window, in chunks of max(window, SMALLEST_CHUNK) tokens unless `chunk` says another number ≥ W."""
    chunk = max(window, SMALLEST_CHUNK) if chunk is None else chunk
    distance = torch.arange(chunk, device=device)[:, None] + chunk - torch.arange(2 * chunk, device=device)
    hidden = (distance < 0) | (distance >= window)
    return Band(window, torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf))


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    runs: Runs | None,
    window: Band | None = None,
    prefixes: Sequence[int | None] | None = None,
) -> Tensor:
    """Tokens attending to one another. q (B, T, H, Dh), k and v (B, T, Kv, Dh) → (B, T, H, Dh).

    runs is what document_runs returned; with runs, padding gets zeros. prefixes is what prefix_runs returned: a
    document's tokens attend to the whole of its prefix too, as if they stood right behind it.
    """
    if window is None or _longest(q, runs, prefixes) <= window.window:
        served = kernels.attention.causal_attention(q, k, v, runs, prefixes)
        if served is not None:
            return served
    return _causal(q, k, v, window) if runs is None else _document_by_document(q, k, v, runs, window, prefixes)


def _longest(q: Tensor, runs: Runs | None, prefixes: Sequence[int | None] | None) -> int:
    """How many tokens the longest document has, with its prefix."""
    if runs is None:
        return q.shape[1]
    lengths = [stop - start for _, start, stop in runs]
    before = [0 if i is None else lengths[i] for i in prefixes or [None] * len(runs)]
    return max((a + b for a, b in zip(before, lengths, strict=True)), default=0)


def _document_by_document(
    q: Tensor, k: Tensor, v: Tensor, runs: Runs, window: Band | None, prefixes: Sequence[int | None] | None
) -> Tensor:
    T, sizes, done = q.shape[1], [], 0
    for row, start, stop in runs:
        sizes += [row * T + start - done, stop - start]  # padding since the last document, and a document
        done = row * T + stop
    sizes.append(q.shape[0] * T - done)
    # one split, whose backward is one cat; the backward of a slice would fill a whole (B, T, H, Dh) for each document
    pieces = list(zip(*(x.flatten(0, 1).split(sizes) for x in (q, k, v)), strict=True))
    y = []
    for i, (q_i, k_i, v_i) in enumerate(pieces):
        prefix = prefixes[i // 2] if prefixes and i % 2 == 1 else None
        if i % 2 == 0:
            y.append(torch.zeros_like(q_i))  # padding
        elif prefix is None:
            y.append(_causal(q_i[None], k_i[None], v_i[None], window)[0])
        else:
            _, k_0, v_0 = pieces[2 * prefix + 1]
            y.append(_continued(q_i, torch.cat([k_0, k_i]), torch.cat([v_0, v_i]), window))
    return torch.cat(y).view(q.shape)


def _continued(q: Tensor, k: Tensor, v: Tensor, window: Band | None) -> Tensor:
    """q (T, H, Dh) of the last T of S tokens, k and v (S, Kv, Dh) of all of them → (T, H, Dh)."""
    T, S = q.shape[0], k.shape[0]
    position = torch.arange(S, device=q.device)
    distance = position[S - T :, None] - position
    allowed = (distance >= 0) if window is None else (distance >= 0) & (distance < window.window)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)[0].transpose(0, 1)


def _causal(q: Tensor, k: Tensor, v: Tensor, window: Band | None) -> Tensor:
    """One document a row, in order."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if window is None or q.shape[2] <= window.window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    return _banded(q, k, v, window.mask).transpose(1, 2)


def _banded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q (B, H, T, Dh), k and v (B, Kv, T, Dh), mask as in Band → (B, H, T, Dh), a chunk of queries at a time."""
    C, outputs = mask.shape[0], []
    q_chunks, k_chunks, v_chunks = (x.split(C, dim=2) for x in (q, k, v))
    for i, queries in enumerate(q_chunks):
        keys, values = (torch.cat(chunks[max(i - 1, 0) : i + 1], dim=2) for chunks in (k_chunks, v_chunks))
        T, first = queries.shape[2], 0 if i else C  # the first chunk has none before it
        here = mask[:T, first : C + T]
        outputs.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=here, enable_gqa=True))
    return torch.cat(outputs, dim=2)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """New tokens over a cache. q (B, T, H, Dh), k and v (B, Kv, S, Dh) → (B, T, H, Dh).

    mask (B, 1, T, S) is added to the scores; None when every query may attend to all S.
    """
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)
