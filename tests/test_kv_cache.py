"""models/kv_cache.py: cached decoding equals a full forward, with windows and without, in documents and beside padding;
a ring holds no more than its window, whatever comes.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models import Decoder, KVCache
from tests.small_llama import EVERY, FAMILIES, SIZES, small_config, small_decoder

WINDOWED = [name for name, setting in FAMILIES.items() if "windows" in setting]


def assert_within_noise(ours: Tensor, wanted: Tensor) -> None:
    """100 ulps of the logits' scale: float32's noise over a few layers, summed in another order."""
    assert (ours - wanted).abs().max() <= 100 * torch.finfo(torch.float32).eps * wanted.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("setting", ["grouped", "llama3 rope", "tied", *FAMILIES])
def test_a_cache_gives_the_logits_of_a_full_forward(setting: str) -> None:
    """Rows of unequal length, tokens one and several at a time, rows that leave and rows that are repeated.

    All windows are shorter than the longest prompt, and than the longest piece.
    """
    model = small_decoder(**EVERY[setting])
    rows = torch.randint(0, 96, (3, 45))
    full = model(rows)
    cache = KVCache(model.config, 3, 45)
    at = [5, 1, 9]
    real = torch.arange(9) < torch.tensor(at)[:, None]
    first = model(rows[:, :9], segment_ids=real.long(), cache=cache)
    assert_within_noise(first[real], full[:, :9][real])
    order = [0, 1, 2]
    steps = [(1, [0, 1, 2]), (1, [2, 0]), (4, [1, 1, 0]), (1, [2, 1, 0]), (3, [0, 1]), (12, [1, 0, 0]), (1, [1, 2, 0])]
    for new, keep in [*steps, (1, [0, 1]), (9, [0]), (2, [0]), (1, [0])]:
        ids = torch.stack([rows[order[i], at[i] : at[i] + new] for i in range(len(order))])
        wanted = torch.stack([full[order[i], at[i] : at[i] + new] for i in range(len(order))])
        assert_within_noise(model(ids, cache=cache), wanted)
        at = [a + new for a in at]
        assert cache.lengths == at
        cache.select(keep)
        order, at = [order[i] for i in keep], [at[i] for i in keep]


@torch.no_grad()
@pytest.mark.parametrize("setting", ["grouped", *WINDOWED])
def test_a_cache_keeps_documents_apart(setting: str) -> None:
    """A row of two documents goes on with its last one; another id starts afresh."""
    model = small_decoder(**EVERY[setting])
    ids = torch.randint(0, 96, (1, 24))
    cache = KVCache(model.config, 1, 24)
    model(ids[:, :9], segment_ids=torch.tensor([[1] * 4 + [2] * 5]), cache=cache)
    second = model(ids[:, 4:11])
    assert_within_noise(model(ids[:, 9:10], cache=cache)[0, -1], second[0, 5])
    assert_within_noise(model(ids[:, 10:11], cache=cache)[0, -1], second[0, 6])
    third = {"position_ids": torch.arange(12)[None], "segment_ids": torch.full((1, 12), 3)}
    whole = model(ids[:, 11:])
    assert_within_noise(model(ids[:, 11:23], cache=cache, **third), whole[:, :12])
    assert_within_noise(model(ids[:, 23:], cache=cache), whole[:, 12:])


@torch.no_grad()
@pytest.mark.parametrize("setting", ["grouped", *WINDOWED])
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.usefixtures("nan_filled_empty")
def test_padding_that_follows_a_cache_makes_no_nan_and_costs_no_entry(T: int, setting: str) -> None:
    """Row 1 sits out while row 0 takes T tokens, twice; then both go on."""
    model = small_decoder(**EVERY[setting])
    ids = torch.randint(0, 96, (2, 40))
    cache = KVCache(model.config, 2, 40)
    model(ids[:, :9], cache=cache)
    segments = torch.tensor([[1] * T, [0] * T])
    for start in (9, 9 + T):
        assert model(ids[:, start : start + T], segment_ids=segments, cache=cache).isfinite().all()
    assert cache.lengths == [9 + 2 * T, 9]
    later = ids[:, 9 + 2 * T : 14 + 2 * T]
    wanted = torch.cat([model(ids[:1, : 14 + 2 * T])[:, -5:], model(torch.cat([ids[1:, :9], later[1:]], 1))[:, -5:]])
    found = [model(later[:, :1], cache=cache), model(later[:, 1:4], cache=cache), model(later[:, 4:], cache=cache)]
    assert_within_noise(torch.cat(found, dim=1), wanted)


@torch.no_grad()
def test_a_ring_is_as_large_as_its_window_and_stays_so() -> None:
    """Every layer of Mistral: 5 entries a row, for a text of 10 and one of 200, whatever the capacity."""
    model = small_decoder(**FAMILIES["mistral"], max_position_embeddings=4096)
    cache = KVCache(model.config, 2, 100_000)
    ring = 2 * 5 * SIZES["num_key_value_heads"] * 6  # rows · window · Kv · Dh
    assert cache.nbytes == 2 * 2 * ring * 4  # layers · keys and values · fp32
    places = [stored.data_ptr() for stored in (*cache.keys, *cache.values)]
    ids = torch.randint(0, 96, (2, 200))
    full = model(ids)
    assert_within_noise(model(ids[:, :150], cache=cache), full[:, :150])
    for start, stop in [(150, 151), (151, 190), *((at, at + 1) for at in range(190, 200))]:
        assert_within_noise(model(ids[:, start:stop], cache=cache), full[:, start:stop])
    assert cache.used == 200
    assert [stored.data_ptr() for stored in (*cache.keys, *cache.values)] == places
    assert all(stored.untyped_storage().nbytes() == ring * 4 for stored in (*cache.keys, *cache.values))
    assert {ring.positions.shape for ring in cache.rings.values()} == {(2, 5)}


def test_each_layer_has_the_entries_that_its_window_needs() -> None:
    config = small_config(**FAMILIES["qwen2, last layers windowed"])
    assert [keys.shape for keys in KVCache(config, 2, 30).keys] == [(2, 2, S, 10) for S in (30, 7, 7)]
    assert [values.shape for values in KVCache(config, 2, 4).values] == [(2, 2, 4, 10)] * 3


def hidden_pairs(model: Decoder, cache: KVCache, T: int) -> list[bool]:
    positions, segments = cache.next_tokens(T)
    cache.extend(positions, segments, [T] * len(cache.lengths), True)
    masks = cache.masks(positions, segments, torch.float32)
    return [masks[window] is not None for window in dict.fromkeys(cache.windows)]


@torch.no_grad()
def test_a_full_ring_needs_no_mask() -> None:
    """One token a row: rows of equal length never need one, others none in a ring that each of them has filled."""
    model = small_decoder(**FAMILIES["qwen2, last layers windowed"])
    ids = torch.randint(0, 96, (2, 12))
    cache = KVCache(model.config, 2, 40)
    model(ids[:, :6], cache=cache)
    assert hidden_pairs(model, cache, 1) == [False, False]
    cache = KVCache(model.config, 2, 40)
    model(ids, segment_ids=(torch.arange(12) < torch.tensor([[12], [5]])).long(), cache=cache)
    assert [hidden_pairs(model, cache, 1) for _ in range(3)] == [[True, True], [True, False], [True, False]]
    assert hidden_pairs(model, cache, 2) == [True, True]


@torch.no_grad()
def test_no_slot_is_written_twice_and_padding_sees_something() -> None:
    """Which of two writes stays is undefined, and so is softmax over nothing: kernels differ."""
    model = small_decoder(**FAMILIES["mistral"])
    cache = KVCache(model.config, 2, 40)
    segments = (torch.arange(12) < torch.tensor([[12], [8]])).long()
    model(torch.randint(0, 96, (2, 12)), segment_ids=segments, cache=cache)
    (ring,) = cache.rings.values()
    rows, columns, slots = ring._slots
    assert len(set(zip(rows.tolist(), slots.tolist(), strict=True))) == len(slots) == 2 * 5
    assert columns.tolist() == [*range(7, 12), *range(3, 8)]
    positions, last = cache.next_tokens(2)
    padded = last * torch.tensor([[1], [0]])
    cache.extend(positions, padded, [2, 0], False)
    for mask in cache.masks(positions, padded, torch.float32).values():
        assert (mask == 0).any(dim=-1).all()


def test_a_cache_that_is_full_or_padded_on_the_left_is_refused() -> None:
    """A ring is full only where the capacity is less than the window."""
    model = small_decoder()
    ids = torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"room for 4 tokens a row, got 0 \+ 5"):
        model(ids, cache=KVCache(model.config, 1, 4))
    with pytest.raises(ValueError, match="padding must be on the right"):
        model(ids, segment_ids=torch.tensor([[0, 1, 1, 1, 1]]), cache=KVCache(model.config, 1, 8))
    windowed = small_decoder(**FAMILIES["mistral"])
    with pytest.raises(ValueError, match=r"room for 4 tokens a row, got 0 \+ 5"):
        windowed(ids, cache=KVCache(windowed.config, 1, 4))
    windowed(ids.expand(1, 5), cache=KVCache(windowed.config, 1, 5))
