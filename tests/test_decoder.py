"""models/attention.py, kv_cache.py and decoder.py against float64 loops, and against themselves where that is exact.

Packed documents equal separate ones, cached decoding equals a full forward, checkpointing changes no gradient.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from lora import LoRAConfig, add_adapter, disabled_adapters, quantize_model, set_adapter, trainable_parameters
from models import Decoder, KVCache
from models.attention import (
    allowed_pairs,
    apply_rope,
    attention_reference,
    causal_attention,
    document_runs,
    rope_frequencies,
    rope_tables,
)
from models.config import RopeConfig
from models.decoder import RMSNorm, document_positions
from tests.accuracy import assert_as_accurate_as, leaf
from tests.small_llama import LLAMA3, SETTINGS, llama3_factors, small_config, small_decoder

DTYPES = [torch.float32, torch.bfloat16]
LAYOUTS = {
    "one document": [[1] * 9, [1] * 9],
    "padding on the right": [[1] * 9, [1] * 4 + [0] * 5],
    "padding on the left": [[0] * 3 + [1] * 6, [1] * 9],
    "several documents": [[1] * 4 + [2] * 2 + [3] * 3, [7] * 5 + [2] * 4],
    "everything": [[0, 0, 5, 5, 0, 1, 1, 1, 0], [0] * 9],
}


def attention_loops(q: Tensor, k: Tensor, v: Tensor, segments: list[list[int]]) -> Tensor:
    """(B, T, H, Dh) float64: each token over the tokens before it with its own segment id; zeros at padding."""
    B, T, H, Dh = q.shape
    group = H // k.shape[2]
    out = torch.zeros(q.shape, dtype=torch.float64)
    q, k, v = (x.detach().double() for x in (q, k, v))
    for b in range(B):
        for t in range(T):
            seen = [s for s in range(t + 1) if segments[b][s] == segments[b][t] != 0]
            for h in range(H):
                scores = [float(q[b, t, h] @ k[b, s, h // group]) / math.sqrt(Dh) for s in seen]
                total = math.fsum(math.exp(score) for score in scores)
                for s, score in zip(seen, scores, strict=True):
                    out[b, t, h] += math.exp(score) / total * v[b, s, h // group]
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_without_masks_equals_the_definition(layout: str, dtype: torch.dtype) -> None:
    segments = LAYOUTS[layout]
    ids = torch.tensor(segments)
    q, k, v, dy = (torch.randn(2, 9, heads, 6).to(dtype) for heads in (24, 8, 8, 24))
    real = (ids != 0)[:, :, None, None]
    exact = attention_loops(q, k, v, segments)
    positions = torch.arange(9)[None]
    allowed = allowed_pairs(positions, ids, positions, ids)
    results = []
    for name in ("fast", "reference", "float64"):
        wide = torch.float64 if name == "float64" else dtype
        inputs = [leaf(x.to(wide)) for x in (q, k, v)]
        y = causal_attention(*inputs, document_runs(ids)) if name == "fast" else attention_reference(*inputs, allowed)
        y = y * real
        y.backward((dy * real).to(wide))
        results.append((y, *(x.grad for x in inputs)))
    fast, reference, float64 = results
    torch.testing.assert_close(float64[0].detach(), exact, rtol=1e-12, atol=1e-12)
    for ours, plain, wide in zip(fast, reference, float64, strict=True):
        assert_as_accurate_as(plain, ours, wide.detach())


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


@pytest.mark.parametrize("rope", [RopeConfig(theta=100.0), RopeConfig("linear", 100.0, 4.0), LLAMA3], ids=str)
def test_rope_turns_pairs_by_position_times_frequency(rope: RopeConfig) -> None:
    """x_i + j·x_{i+Dh/2} times exp(j·p·ω_i), in complex float64."""
    config = small_config(rope=rope, head_dim=16)
    divisors = {"default": [1.0] * 8, "linear": [4.0] * 8, "llama3": llama3_factors(config).tolist()}[rope.rope_type]
    x, positions = torch.randn(1, 5, 2, 16), torch.tensor([[0, 1, 7, 30, 63]])
    turned = apply_rope(x, *rope_tables(positions, rope_frequencies(config)))
    for t, p in enumerate(positions[0].tolist()):
        for h in range(2):
            for i in range(8):
                angle = p * rope.theta ** (-2 * i / 16) / divisors[i]
                wanted = complex(x[0, t, h, i], x[0, t, h, i + 8]) * cmath.exp(1j * angle)
                found = complex(turned[0, t, h, i], turned[0, t, h, i + 8])
                assert abs(found - wanted) <= 64 * torch.finfo(torch.float32).eps * abs(wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm(dtype: torch.dtype) -> None:
    norm = RMSNorm(7, 1e-3)
    torch.nn.init.normal_(norm.weight)
    x = (3 * torch.randn(2, 4, 7)).to(dtype)
    for row, out in zip(x.double().view(-1, 7).tolist(), norm(x).double().view(-1, 7).tolist(), strict=True):
        scale = 1 / math.sqrt(math.fsum(v * v for v in row) / 7 + 1e-3)
        wanted = [v * scale * g for v, g in zip(row, norm.weight.tolist(), strict=True)]
        assert out == pytest.approx(wanted, rel=torch.finfo(dtype).eps, abs=1e-6)
    assert norm(x).dtype == dtype


def test_positions_count_from_zero_in_every_document() -> None:
    segments = torch.tensor([[0, 0, 5, 5, 5, 2, 2, 0]])
    assert document_positions(segments, segments)[0].tolist() == [0, 1, 0, 1, 2, 0, 1, 0]
    assert document_positions(segments, None).tolist() == [list(range(8))]


def loss_of(model: Decoder, ids: Tensor, segments: Tensor | None = None) -> Tensor:
    """Sum of next-token losses inside documents."""
    logits = model(ids, segment_ids=segments)
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    if segments is None:
        return losses.sum()
    return losses[((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)).flatten()].sum()


@pytest.mark.parametrize("setting", ["grouped", "llama3 rope"])
def test_packed_documents_equal_separate_ones(setting: str) -> None:
    model = small_decoder(**SETTINGS[setting])
    documents = [torch.randint(0, 96, (1, n)) for n in (7, 12, 5)]
    packed = torch.cat([*documents, torch.zeros(1, 3, dtype=torch.int64)], dim=1)
    segments = torch.tensor([[1] * 7 + [2] * 12 + [3] * 5 + [0] * 3])
    loss_of(model, packed, segments).backward()
    together = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    sum(loss_of(model, document) for document in documents).backward()  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            together[name], parameter.grad, rtol=1e-4, atol=1e-4 * float(parameter.grad.abs().max())
        )


def assert_within_noise(ours: Tensor, wanted: Tensor) -> None:
    """100 ulps of the logits' scale: float32's noise over two layers, summed in another order."""
    assert (ours - wanted).abs().max() <= 100 * torch.finfo(torch.float32).eps * wanted.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("setting", ["grouped", "llama3 rope", "tied"])
def test_a_cache_gives_the_logits_of_a_full_forward(setting: str) -> None:
    """Rows of unequal length, tokens one and several at a time, rows that leave and rows that are repeated."""
    model = small_decoder(**SETTINGS[setting])
    rows = torch.randint(0, 96, (3, 20))
    full = model(rows)
    cache = KVCache(model.config, 3, 20)
    at = [5, 1, 9]
    real = torch.arange(9) < torch.tensor(at)[:, None]
    first = model(rows[:, :9], segment_ids=real.long(), cache=cache)
    assert_within_noise(first[real], full[:, :9][real])
    order = [0, 1, 2]
    for new, keep in [(1, [0, 1, 2]), (1, [2, 0]), (4, [1, 1, 0]), (1, [2, 1, 0]), (3, [0])]:
        ids = torch.stack([rows[order[i], at[i] : at[i] + new] for i in range(len(order))])
        wanted = torch.stack([full[order[i], at[i] : at[i] + new] for i in range(len(order))])
        assert_within_noise(model(ids, cache=cache), wanted)
        at = [a + new for a in at]
        assert cache.lengths == at
        cache.select(keep)
        order, at = [order[i] for i in keep], [at[i] for i in keep]


@torch.no_grad()
def test_a_cache_keeps_documents_apart() -> None:
    """A row of two documents goes on with its last one; another id starts afresh."""
    model = small_decoder()
    ids = torch.randint(0, 96, (1, 14))
    cache = KVCache(model.config, 1, 14)
    model(ids[:, :9], segment_ids=torch.tensor([[1] * 4 + [2] * 5]), cache=cache)
    second = model(ids[:, 4:11])
    assert_within_noise(model(ids[:, 9:10], cache=cache)[0, -1], second[0, 5])
    assert_within_noise(model(ids[:, 10:11], cache=cache)[0, -1], second[0, 6])
    third = {"position_ids": torch.arange(3)[None], "segment_ids": torch.full((1, 3), 3)}
    assert_within_noise(model(ids[:, 11:], cache=cache, **third), model(ids[:, 11:]))


@torch.no_grad()
@pytest.mark.usefixtures("nan_filled_empty")
def test_padding_that_follows_a_cache_makes_no_nan() -> None:
    model = small_decoder()
    ids = torch.randint(0, 96, (2, 12))
    cache = KVCache(model.config, 2, 12)
    model(ids[:, :5], cache=cache)
    segments = torch.tensor([[1, 1, 1], [0, 0, 0]])
    assert model(ids[:, 5:8], segment_ids=segments, cache=cache).isfinite().all()
    assert cache.lengths == [8, 5]
    wanted = torch.stack([model(ids[:1, :9])[0, -1], model(torch.cat([ids[1:, :5], ids[1:, 8:9]], 1))[0, -1]])
    assert_within_noise(model(ids[:, 8:9], cache=cache)[:, 0], wanted)


def test_a_cache_that_is_full_or_padded_on_the_left_is_refused() -> None:
    model = small_decoder()
    ids = torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"room for 4 tokens a row, got 0 \+ 5"):
        model(ids, cache=KVCache(model.config, 1, 4))
    with pytest.raises(ValueError, match="padding must be on the right"):
        model(ids, segment_ids=torch.tensor([[0, 1, 1, 1, 1]]), cache=KVCache(model.config, 1, 8))


def gradients(model: Decoder, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    run().backward()
    return {name: p.grad.clone() for name, p in trainable_parameters(model) if p.grad is not None}


@pytest.mark.parametrize("kind", ["full", "lora", "qlora", "lora with dropout", "packed"])
def test_checkpointing_changes_no_gradient(kind: str) -> None:
    """To the bit, dropout's random numbers included; and it reaches every adapter."""
    model = small_decoder()
    if kind == "qlora":
        quantize_model(model)
    if "lora" in kind:
        add_adapter(model, LoRAConfig(r=4, dropout=0.3 if "dropout" in kind else 0.0))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        model.train()
    ids = torch.randint(0, 96, (2, 16))
    segments = torch.tensor([[1] * 9 + [2] * 7, [1] * 12 + [0] * 4]) if kind == "packed" else None

    def run() -> Tensor:
        torch.manual_seed(5)
        return loss_of(model, ids, segments)

    plain = gradients(model, run)
    model.gradient_checkpointing = True
    checkpointed = gradients(model, run)
    assert plain.keys() == checkpointed.keys() == {name for name, _ in trainable_parameters(model)}
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name
        assert gradient.abs().max() > 0, name


def test_checkpointing_runs_each_layer_again_and_only_where_a_gradient_is_wanted() -> None:
    model = small_decoder()
    calls: list[int] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    ids = torch.randint(0, 96, (1, 8))
    model.gradient_checkpointing = True
    loss_of(model, ids).backward()
    assert len(calls) == 4
    with torch.no_grad():
        model(ids)
    assert len(calls) == 6


def test_recomputation_uses_the_adapters_and_the_backend_of_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward with adapter `one`, backward after a switch to none: the gradient is that of `one`."""
    model = small_decoder()
    for name in ("one", "two"):
        add_adapter(model, LoRAConfig(r=4), name)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    set_adapter(model, "one")
    ids = torch.randint(0, 96, (1, 12))
    plain = gradients(model, lambda: loss_of(model, ids))
    model.gradient_checkpointing = True
    asked: list[str] = []
    matmul = kernels.lora_matmul

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        asked.append(kernels.dispatch.asked_backend())
        return matmul(*args, **kwargs)

    monkeypatch.setattr(kernels, "lora_matmul", spy)
    model.zero_grad()
    with kernels.use_backend("reference"):
        loss = loss_of(model, ids)
    with disabled_adapters(model):
        loss.backward()
    assert set(asked) == {"reference"}
    for name, gradient in plain.items():
        assert torch.equal(gradient, model.get_parameter(name).grad), name


def test_compute_dtype_runs_fp32_weights_in_bf16() -> None:
    model = small_decoder()
    assert model.compute_dtype == torch.float32
    ids = torch.randint(0, 96, (2, 11))
    exact = model(ids, return_hidden=True)
    model.compute_dtype = torch.bfloat16
    hidden = model(ids, return_hidden=True)
    assert hidden.dtype == torch.bfloat16
    assert model(ids).dtype == torch.float32
    loss_of(model, ids).backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    low = small_decoder()
    low.load_state_dict(model.state_dict())
    low.bfloat16()
    assert (hidden - exact).norm() <= 2 * (low(ids, return_hidden=True) - exact).norm()
    assert torch.equal(low._frequencies, model._frequencies)
    assert low._frequencies.dtype == torch.float32


@pytest.mark.parametrize("setting", ["grouped", "tied"])
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
def test_the_head_in_a_fused_loss_equals_the_logits(setting: str, adapted: bool) -> None:
    model = small_decoder(**SETTINGS[setting])
    if adapted:
        add_adapter(model, LoRAConfig(r=4, target_modules=["lm_head", "q_proj"]))
        torch.nn.init.normal_(model.lm_head.lora_B["default"])  # type: ignore[operator, index]
    ids, targets = torch.randint(0, 96, (2, 9)), torch.randint(0, 96, (18,))
    hidden = model(ids, return_hidden=True).view(18, -1)
    fused = kernels.linear_cross_entropy(hidden, model.head(), targets)
    torch.testing.assert_close(fused, F.cross_entropy(model(ids).view(18, -1), targets, reduction="none"))


def test_a_tied_head_is_the_embedding() -> None:
    tied, untied = small_decoder(tie_word_embeddings=True), small_decoder()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert len(list(untied.parameters())) == len(list(tied.parameters())) + 1


def test_a_decoder_with_impossible_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="head_dim must be even"):
        Decoder(small_config(head_dim=7))
