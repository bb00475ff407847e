"""models/decoding.py and kernels/cpu/decode.h: all layers in one call equal the decoder's own forward, in every family,
with windows, adapters and rows of unequal length, that leave and come together again; what is not served goes there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
import kernels.decode
from kernels.cpu.build import build
from kernels.cpu.library import usable_isas
from lora import LoRAConfig, add_adapter, disabled_adapters, quantize_model, set_adapter
from models import Decoder, KVCache, generate
from models.decoding import decoding_step
from tests.small_llama import EVERY, small_decoder

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 16}
"""every matrix has a K that the C kernels take: a multiple of 32"""
LENGTHS = [5, 1, 11, 8]


def in_4_bits(setting: str = "grouped", **changes: Any) -> Decoder:
    sizes = {**EVERY[setting], **SIZES, **changes}
    if sizes["num_attention_heads"] % sizes.get("num_key_value_heads", 2):
        sizes["num_key_value_heads"] = 4
    return quantize_model(small_decoder(**sizes))  # type: ignore[return-value]


def prefilled(model: Decoder, lengths: list[int] = LENGTHS, capacity: int = 40) -> KVCache:
    ids = torch.randint(0, 96, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    cache = KVCache(model.config, len(lengths), capacity, dtype=model.compute_dtype)
    with torch.no_grad():
        model(ids, segment_ids=real.long(), cache=cache)
    return cache


@torch.no_grad()
def run(model: Decoder, steps: int = 12) -> Tensor:
    """Hidden states of some tokens a row, rows leaving and coming twice on the way: fp32 (ΣR, D)."""
    cache, step, found = prefilled(model), decoding_step(model), []
    tokens = torch.arange(4)
    for n in range(steps):
        found.append(step(tokens, cache).float())
        if n == 4:
            cache.select([0, 3, 2])  # row 3 takes the place of one that leaves
            tokens = tokens[[0, 3, 2]]
        if n == 7:
            cache.select([2, 0, 1, 1])
            tokens = tokens[[2, 0, 1, 1]]
        tokens = (7 * tokens + 3) % 96
    return torch.cat(found)


def by_definition(model: Decoder, **options: Any) -> Tensor:
    with kernels.use_backend("reference"):
        return run(model, **options)


def is_served(model: Decoder) -> bool:
    return decoding_step(model).__name__ == "step"


def assert_within_noise(ours: Tensor, wanted: Tensor) -> None:
    """100 ulps of the scale: float32's noise over a few layers, summed in another order."""
    assert (ours - wanted).abs().max() <= 100 * torch.finfo(torch.float32).eps * wanted.abs().max()


@pytest.mark.parametrize("setting", EVERY)
def test_one_call_equals_the_definition(setting: str) -> None:
    model = in_4_bits(setting)
    assert is_served(model)
    assert_within_noise(run(model), by_definition(model))


@pytest.mark.parametrize("isa", usable_isas(build()))
def test_every_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """head_dim 6 and 20 end in part of a vector, 80 is more than four."""
    monkeypatch.setenv("QLORA_CPU_ISA", isa)
    for head_dim in (6, 20, 80):
        model = in_4_bits(head_dim=head_dim)
        assert_within_noise(run(model), by_definition(model))


@pytest.mark.parametrize("isa", usable_isas(build()))
def test_projections_of_one_input_may_have_other_levels(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """k and up in FP4 between q, v and gate in NF4: they are one call, and each looks up its own table."""
    monkeypatch.setenv("QLORA_CPU_ISA", isa)
    model = small_decoder(**{**EVERY["grouped"], **SIZES})
    quantize_model(model, skip=("k_proj", "up_proj", "lm_head"))
    quantize_model(model, quant_type="fp4")
    assert is_served(model)
    assert_within_noise(run(model), by_definition(model))


def test_adapters_that_are_on_and_trained_biases() -> None:
    model = in_4_bits("biases")
    for name, r in (("one", 4), ("two", 3)):
        add_adapter(model, LoRAConfig(r=r, alpha=9, bias="all" if name == "one" else "none"), name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "trained_bias" in name:
                parameter.normal_()
    with disabled_adapters(model):
        without = run(model)
    for on in ("one", "two", ("one", "two")):
        set_adapter(model, on)
        assert is_served(model)
        ours = run(model)
        assert_within_noise(ours, by_definition(model))
        assert not torch.allclose(ours, without, atol=1e-3)


@pytest.mark.parametrize("adapted", [False, True], ids=["", "adapter"])
@pytest.mark.parametrize("isa", usable_isas(build()))
def test_bf16_is_as_accurate_as_the_definition_in_bf16(
    isa: str, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Error against the same weights in fp32, at most twice the definition's."""
    monkeypatch.setenv("QLORA_CPU_ISA", isa)
    model = in_4_bits("qwen3")
    if adapted:
        add_adapter(model, LoRAConfig(r=3))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
    exact = by_definition(model)
    model.compute_dtype = torch.bfloat16
    assert is_served(model)
    ours, plain = ((h - exact).norm().item() for h in (run(model), by_definition(model)))
    assert 0 < ours <= 2 * plain


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    model, threads = in_4_bits("qwen2, last layers windowed"), torch.get_num_threads()
    caches, found = [prefilled(model) for _ in range(2)], []
    try:
        for n, cache in zip((1, 3), caches, strict=True):
            torch.set_num_threads(n)
            found.append(decoding_step(model)(torch.arange(4), cache))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    assert all(torch.equal(a, b) for a, b in zip(caches[0].keys, caches[1].keys, strict=True))


def test_what_is_not_served_goes_through_the_decoder() -> None:
    dense = small_decoder(**SIZES)
    narrow = quantize_model(small_decoder())
    dora = add_adapter(in_4_bits(), LoRAConfig(r=4, use_dora=True))
    half = in_4_bits()
    half.compute_dtype = torch.float16
    for model in (dense, narrow, dora, half):
        assert not is_served(model)  # type: ignore[arg-type]
    model = in_4_bits()
    with kernels.use_backend("reference"):
        assert not is_served(model)
    with kernels.use_backend("cpu"):
        assert is_served(model)


def test_a_full_cache_is_refused_and_a_ring_is_never_full() -> None:
    model = in_4_bits()
    cache, step = prefilled(model, capacity=12), decoding_step(model)
    step(torch.arange(4), cache)
    with pytest.raises(ValueError, match=r"room for 12 tokens a row, got 12 \+ 1"):
        step(torch.arange(4), cache)
    windowed = in_4_bits("mistral")
    cache, step = prefilled(windowed, capacity=12), decoding_step(windowed)
    for _ in range(9):
        step(torch.arange(4), cache)
    assert cache.lengths == [length + 9 for length in LENGTHS]


@torch.no_grad()
def test_several_tokens_may_follow_single_ones() -> None:
    """The entries' positions and documents are kept, so that a forward of several tokens finds its masks."""
    for setting in ("grouped", "mistral", "qwen2, last layers windowed"):
        model = in_4_bits(setting)
        caches = [prefilled(model) for _ in range(2)]
        step = decoding_step(model)
        for token in range(3):
            tokens = torch.full((4,), token)
            step(tokens, caches[0])
            model(tokens[:, None], cache=caches[1])
        ids = torch.randint(0, 96, (4, 5))
        assert_within_noise(model(ids, cache=caches[0]), model(ids, cache=caches[1]))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dense", "one call"])
def test_in_bf16_company_and_cache_decide_only_between_logits_that_are_closer_than_their_noise(kind: str) -> None:
    """24 prompts in a batch, alone, and without a cache. The noise is the largest difference between the logits of
    equal tokens, cached in the batch and by a full forward alone; two logits may each move by it."""
    model = small_decoder(**SIZES) if kind == "dense" else in_4_bits()
    model.compute_dtype = torch.bfloat16
    prompts = torch.randint(0, 96, (24, 7), generator=torch.Generator().manual_seed(5)).tolist()
    together = [c.ids for c in generate(model, prompts, max_new_tokens=24)]
    cache, step = KVCache(model.config, 24, 31, dtype=torch.bfloat16), decoding_step(model)
    model(torch.tensor(prompts), cache=cache)
    cached = torch.stack([model.logits(step(tokens, cache)) for tokens in torch.tensor(together).T], dim=1)
    parted = noise = 0.0
    for prompt, ids, batched in zip(prompts, together, cached, strict=True):
        logits = model(torch.tensor([prompt + ids]))[0]
        noise = max(noise, float((logits[len(prompt) :] - batched).abs().max()))
        alone = generate(model, [prompt], max_new_tokens=24)[0].ids
        uncached = logits[len(prompt) - 1 : -1].argmax(dim=1).tolist()
        for other in (alone, uncached):
            at = next((i for i, (a, b) in enumerate(zip(ids, other, strict=True)) if a != b), None)
            if at is not None:
                best = logits[len(prompt) - 1 + at].topk(2).values
                parted = max(parted, float(best[0] - best[1]))
    print(f"{kind}: batch noise {noise:.4f}; completions part where the best two are {parted:.4f} apart at most")
    assert parted <= 2 * noise


def test_sampled_logps_equal_a_fresh_forward() -> None:
    model = in_4_bits("qwen2, last layers windowed")
    prompts = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]]
    completions = generate(model, prompts, max_new_tokens=25, num_generations=2, temperature=0.8, stop_ids=range(9))
    assert len({len(completion.ids) for completion in completions}) > 1
    for i, completion in enumerate(completions):
        ids = prompts[i // 2] + completion.ids
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, len(prompts[i // 2]) - 1 : -1].double() / 0.8
        wanted = logits.log_softmax(1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        bound = 100 * torch.finfo(torch.float32).eps * float(logits.abs().max())
        assert completion.logps == pytest.approx(wanted.tolist(), abs=bound)
