"""models/attention.py against float64 loops, forward and gradients: documents, sliding windows, rotary positions.

A window is evaluated in chunks; what those chunks hold is checked too: nothing as large as T·T.
"""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.attention import (
    SMALLEST_CHUNK,
    allowed_pairs,
    apply_rope,
    attention_reference,
    band,
    causal_attention,
    document_runs,
    rope_frequencies,
    rope_scale,
    rope_tables,
)
from models.config import DecoderConfig
from models.rope_config import RopeConfig
from tests.accuracy import assert_as_accurate_as, leaf
from tests.small_llama import FAMILIES, LLAMA3, YARN, llama3_factors, small_config, small_decoder

DTYPES = [torch.float32, torch.bfloat16]
LAYOUTS = {
    "one document": [[1] * 9, [1] * 9],
    "padding on the right": [[1] * 9, [1] * 4 + [0] * 5],
    "padding on the left": [[0] * 3 + [1] * 6, [1] * 9],
    "several documents": [[1] * 4 + [2] * 2 + [3] * 3, [7] * 5 + [2] * 4],
    "everything": [[0, 0, 5, 5, 0, 1, 1, 1, 0], [0] * 9],
}


def attention_loops(q: Tensor, k: Tensor, v: Tensor, segments: list[list[int]], window: int) -> Tensor:
    """(B, T, H, Dh) float64: each token over itself and the window - 1 tokens before it that have its own segment id;
    zeros at padding."""
    B, T, H, Dh = q.shape
    group = H // k.shape[2]
    out = torch.zeros(q.shape, dtype=torch.float64)
    q, k, v = (x.detach().double() for x in (q, k, v))
    for b in range(B):
        for t in range(T):
            seen = [s for s in range(max(t - window + 1, 0), t + 1) if segments[b][s] == segments[b][t] != 0]
            for h in range(H):
                scores = [float(q[b, t, h] @ k[b, s, h // group]) / math.sqrt(Dh) for s in seen]
                total = math.fsum(math.exp(score) for score in scores)
                for s, score in zip(seen, scores, strict=True):
                    out[b, t, h] += math.exp(score) / total * v[b, s, h // group]
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("window", "chunk"), [(None, None), (1, 1), (2, 2), (2, 7), (3, 3), (3, 4), (4, 8), (3, None), (8, None), (9, None)]
)
def test_attention_without_masks_equals_the_definition(
    window: int | None, chunk: int | None, layout: str, dtype: torch.dtype
) -> None:
    """Forward and gradients; a window in one chunk, several, and several of which the last is not whole."""
    segments = LAYOUTS[layout]
    ids = torch.tensor(segments)
    q, k, v, dy = (torch.randn(2, 9, heads, 6).to(dtype) for heads in (24, 8, 8, 24))
    real = (ids != 0)[:, :, None, None]
    exact = attention_loops(q, k, v, segments, window or 9)
    positions = torch.arange(9)[None]
    allowed = allowed_pairs(positions, ids, positions, ids, window=window)
    shared = None if window is None else band(window, chunk=chunk, dtype=dtype)
    results = []
    for name in ("fast", "reference", "float64"):
        inputs = [leaf(x.to(torch.float64 if name == "float64" else dtype)) for x in (q, k, v)]
        if name == "fast":
            y = causal_attention(*inputs, document_runs(ids), shared)
        else:
            y = attention_reference(*inputs, allowed)
        y = y * real
        y.backward((dy * real).to(y.dtype))
        results.append((y, *(x.grad for x in inputs)))
    fast, reference, float64 = results
    torch.testing.assert_close(float64[0].detach(), exact, rtol=1e-12, atol=1e-12)
    for ours, plain, wide in zip(fast, reference, float64, strict=True):
        assert_as_accurate_as(plain, ours, wide.detach())


@pytest.mark.parametrize("setting", ["mistral", "qwen2, other layers windowed"])
def test_what_attention_with_a_window_holds(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of five chunks: no call sees more than two, layers share one mask, and short texts have none."""
    model = small_decoder(**FAMILIES[setting], max_position_embeddings=1024)
    calls: list[tuple[int, int, int | None]] = []
    attention = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: bool) -> Tensor:
        mask = None if attn_mask is None else attn_mask.untyped_storage().data_ptr()
        calls.append((q.shape[2], k.shape[2], mask))
        return attention(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    T = 4 * SMALLEST_CHUNK + 7
    model(torch.randint(0, 96, (1, T)), return_hidden=True)
    masked = [(queries, keys) for queries, keys, mask in calls if mask is not None]
    layers = sum(window is not None for window in model.config.windows)
    C = SMALLEST_CHUNK
    assert masked == [(C, C), (C, 2 * C), (C, 2 * C), (C, 2 * C), (7, C + 7)] * layers
    assert len({mask for _, _, mask in calls} - {None}) == 1
    assert len(calls) - len(masked) == model.config.num_hidden_layers - layers
    calls.clear()
    model(torch.randint(0, 96, (1, min(window for window in model.config.windows if window))))
    assert {mask for _, _, mask in calls} == {None}


def test_a_window_wants_positions_without_jumps() -> None:
    model = small_decoder(**FAMILIES["mistral"])
    ids, positions = torch.zeros(1, 8, dtype=torch.int64), torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    with pytest.raises(ValueError, match="must go up by one within a document, got 0 at row 0, column 3"):
        model(ids, position_ids=positions)
    segments = torch.tensor([[1] * 3 + [2] * 5])
    assert torch.equal(model(ids, position_ids=positions, segment_ids=segments), model(ids, segment_ids=segments))


def test_runs_are_none_only_where_plain_causal_attention_is_exact() -> None:
    plain = {name for name, segments in LAYOUTS.items() if document_runs(torch.tensor(segments)) is None}
    assert plain == {"one document", "padding on the right"}
    assert document_runs(torch.tensor([[0, 3, 3, 2]])) == [(0, 1, 3), (0, 3, 4)]


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([[1, 1], [1, -2]], "must be at least 0, got -2 at row 1, column 1"),
        ([[1, 2, 1]], "name each document of a row in one stretch, got 1 at row 0, column 2"),
        ([[1, 0, 1]], "got 1 at row 0, column 2"),
    ],
)
def test_segment_ids_that_break_the_rule(segments: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        document_runs(torch.tensor(segments))


def yarn_divisors(config: DecoderConfig) -> list[float]:
    """What YaRN divides each frequency by, pair by pair, from how often a pair turns in the original context."""
    rope, Dh = config.rope, config.head_dim

    def pair_that_turns(times: float) -> float:
        """The i of the pair, a fraction, for which original / wavelength_i = times."""
        return Dh / 2 * math.log(rope.original_max_position_embeddings / (2 * math.pi * times), rope.theta)

    fast, slow = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        fast, slow = math.floor(fast), math.ceil(slow)
    fast, slow = max(0, fast), min(Dh - 1, slow)
    stretched = [min(max((i - fast) / (slow - fast), 0), 1) for i in range(Dh // 2)]
    return [1 / (share / rope.factor + (1 - share)) for share in stretched]


ROPES = {
    "default": RopeConfig(theta=100.0),
    "linear": RopeConfig("linear", 100.0, 4.0),
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, no truncation": RopeConfig("yarn", 300.0, 2.5, 1.0, 4.0, 40, 5.0, 0.5, False, 1.3),
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_turns_pairs_by_position_times_frequency(name: str) -> None:
    """scale · (x_i + j·x_{i+Dh/2}) times exp(j·p·ω_i), in complex float64."""
    rope = ROPES[name]
    config = small_config(rope=rope, head_dim=16)
    divisors = [1.0] * 8 if name == "default" else [4.0] * 8
    if rope.rope_type in ("llama3", "yarn"):
        divisors = llama3_factors(config).tolist() if name == "llama3" else yarn_divisors(config)
        assert len(set(divisors)) > 2
    scale = {"yarn": 0.1 * math.log(4.0) + 1, "yarn, no truncation": 1.3}.get(name, 1.0)
    x, positions = torch.randn(1, 5, 2, 16), torch.tensor([[0, 1, 7, 30, 63]])
    turned = apply_rope(x, *rope_tables(positions, rope_frequencies(config), rope_scale(config)))
    for t, p in enumerate(positions[0].tolist()):
        for h in range(2):
            for i in range(8):
                angle = p * rope.theta ** (-2 * i / 16) / divisors[i]
                wanted = scale * complex(x[0, t, h, i], x[0, t, h, i + 8]) * cmath.exp(1j * angle)
                found = complex(turned[0, t, h, i], turned[0, t, h, i + 8])
                assert abs(found - wanted) <= 64 * torch.finfo(torch.float32).eps * abs(wanted)
