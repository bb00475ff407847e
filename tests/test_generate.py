"""models/generate.py and sampling.py: equal completions alone and in any company, log-probabilities against a fresh
forward, drawn frequencies against the definition in numpy, and that nothing is computed which is not needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lora import LoRAConfig, add_adapter, quantize_model
from models import Completion, Decoder, generate
from models.sampling import GOLDEN, _splitmix64, exponentials, row_key, sample
from tests.small_llama import FAMILIES, small_decoder

PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9], [3, 1, 4, 1]]
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 7},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.5},
]


@pytest.fixture
def model() -> Decoder:
    return small_decoder()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["dense", "qlora", "one call"])
def test_a_prompt_gets_the_same_completion_alone_and_in_any_batch(
    settings: dict[str, Any], kind: str, model: Decoder
) -> None:
    if kind == "one call":
        model = small_decoder(hidden_size=64, intermediate_size=96, num_attention_heads=16)
    if kind != "dense":
        add_adapter(quantize_model(model), LoRAConfig(r=4))  # type: ignore[arg-type]
    options = {"max_new_tokens": 30, "stop_ids": (7, 8), "seed": 11, "num_generations": 3, **settings}
    together = generate(model, PROMPTS, **options)
    alone = [completion for prompt in PROMPTS for completion in generate(model, [prompt], **options)]
    reverse = generate(model, PROMPTS[::-1], **options)
    assert [c.ids for c in together] == [c.ids for c in alone]
    for i in range(len(PROMPTS)):
        mirrored = reverse[3 * (len(PROMPTS) - 1 - i) :][:3]
        assert [c.ids for c in mirrored] == [c.ids for c in together[3 * i : 3 * i + 3]]
    for one, other in zip(together, alone, strict=True):
        assert one.logps == pytest.approx(other.logps, abs=1e-4)
    first = generate(model, PROMPTS, **{**options, "num_generations": 1})
    assert [c.ids for c in first] == [c.ids for c in together[::3]]


@pytest.mark.parametrize("setting", FAMILIES)
def test_every_family_beyond_its_windows(setting: str) -> None:
    """Prompts shorter and longer than any window, alone and together; greedy ids are those of full forwards."""
    model = small_decoder(**FAMILIES[setting])
    settings: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0, "num_generations": 2}]
    for options in settings:
        together = generate(model, PROMPTS, max_new_tokens=16, seed=3, **options)
        alone = [generate(model, [p], max_new_tokens=16, seed=3, **options) for p in PROMPTS]
        assert [c.ids for c in together] == [c.ids for completions in alone for c in completions]
    for prompt in PROMPTS:
        ids = generate(model, [prompt], max_new_tokens=16)[0].ids
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1]
        assert ids == logits.argmax(dim=1).tolist()


def test_generations_and_seeds_differ_when_sampling(model: Decoder) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0}
    many = generate(model, [PROMPTS[0]], num_generations=20, seed=1, **options)
    assert len({tuple(c.ids) for c in many}) == 20
    assert generate(model, [PROMPTS[0]], seed=2, **options)[0].ids != many[0].ids
    assert generate(model, [PROMPTS[0]], seed=1, **options)[0].ids == many[0].ids


@torch.no_grad()
def fresh_logps(model: Decoder, prompt: list[int], completion: Completion, temperature: float) -> list[float]:
    """Log-probabilities of the completion's ids by one forward over all of it, in float64."""
    logits = model(torch.tensor([prompt + completion.ids]))[0, len(prompt) - 1 : -1].double()
    scaled = logits / (temperature or 1.0)
    return scaled.log_softmax(1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0].tolist()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_logps_equal_a_fresh_forward(settings: dict[str, Any], model: Decoder) -> None:
    """Before top-k and top-p, after the temperature. Bound: float32's noise over two layers, 100 ulps of the logits."""
    completions = generate(model, PROMPTS, max_new_tokens=25, num_generations=2, stop_ids=(7,), **settings)
    scale = float(model(torch.tensor([PROMPTS[2]])).detach().abs().max()) / (settings["temperature"] or 1.0)
    bound = 100 * torch.finfo(torch.float32).eps * scale
    for i, completion in enumerate(completions):
        wanted = fresh_logps(model, PROMPTS[i // 2], completion, settings["temperature"])
        assert completion.logps == pytest.approx(wanted, abs=bound)


def test_greedy_takes_the_most_probable_token(model: Decoder) -> None:
    ids = list(PROMPTS[0])
    for _ in range(10):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert generate(model, [PROMPTS[0]], max_new_tokens=10)[0].ids == ids[3:]


def definition(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The probabilities of (V,) logits after temperature, top-k and top-p, in float64."""
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    kept = order[: top_k or len(p)]
    share = p[kept] / p[kept].sum()
    fewest = int(np.searchsorted(share.cumsum(), top_p)) + 1
    out = np.zeros_like(p)
    out[kept[:fewest]] = p[kept[:fewest]]
    return out / out.sum()


@pytest.mark.parametrize("settings", SETTINGS[1:], ids=str)
@pytest.mark.parametrize("V", [30, 300], ids=["one block", "blocks and a rest"])
def test_tokens_are_drawn_with_the_probabilities_of_the_definition(settings: dict[str, Any], V: int) -> None:
    """40,000 rows of one distribution: Pearson's χ² within five standard deviations of its mean."""
    N = 40_000
    logits = 2 * torch.randn(V)
    options = {"top_k": 0, "top_p": 1.0, **settings}
    wanted = definition(logits.double().numpy(), **options)
    keys = torch.tensor([row_key(3, [1, 2], g) for g in range(N)])
    tokens, logps = sample(logits.expand(N, V), keys, torch.full((N,), 9), **options)
    torch.testing.assert_close(logps, (logits / options["temperature"]).log_softmax(0)[tokens])
    counts = np.bincount(tokens.numpy(), minlength=V)
    assert counts[wanted == 0].sum() == 0
    expected = N * wanted[wanted > 0]
    statistic = float(((counts[wanted > 0] - expected) ** 2 / expected).sum())
    degrees = len(expected) - 1
    assert statistic <= degrees + 5 * np.sqrt(2 * degrees)


def test_top_p_keeps_at_least_one_token_and_top_p_1_keeps_all() -> None:
    logps = torch.tensor([[0.5, 0.3, 0.2]]).log()
    keys, position = torch.arange(2000), torch.zeros(2000, dtype=torch.int64)
    for top_p, kept in [(1e-6, {0}), (0.5, {0}), (0.51, {0, 1}), (0.81, {0, 1, 2}), (1.0, {0, 1, 2})]:
        tokens, _ = sample(logps.expand(2000, 3), keys, position, temperature=1.0, top_p=top_p)
        assert set(tokens.tolist()) == kept


def test_splitmix64_equals_its_published_output() -> None:
    """The first three outputs of the generator from seed 0."""
    states = torch.tensor([1, 2, 3]) * GOLDEN
    outputs = [value % 2**64 for value in _splitmix64(states).tolist()]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_random_numbers_belong_to_the_row_and_are_exponential() -> None:
    tokens = torch.arange(1000)
    keys = torch.tensor([row_key(0, [1], 0), row_key(1, [1], 0), row_key(0, [2], 0), row_key(0, [1], 1)])
    positions = torch.tensor([5, 5, 5, 5])
    drawn = exponentials(keys, positions, tokens.expand(4, 1000))
    assert len(torch.unique(drawn)) == 4000
    assert len(torch.unique(torch.cat([drawn, exponentials(keys, positions + 1, tokens.expand(4, 1000))]))) == 8000
    assert torch.equal(exponentials(keys[2:3], positions[2:3], tokens[None, 40:50]), drawn[2:3, 40:50])
    ordered = torch.sort(1 - torch.exp(-drawn.flatten())).values
    steps = torch.arange(1, 4001) / 4000
    assert float((ordered - steps).abs().max()) <= 1.95 / np.sqrt(4000)  # Kolmogorov-Smirnov at 0.1%


def test_stop_tokens_end_a_row_and_are_its_last_id(model: Decoder) -> None:
    free = generate(model, PROMPTS, max_new_tokens=20)
    stop = free[0].ids[4]
    for completion, before in zip(generate(model, PROMPTS, max_new_tokens=20, stop_ids=[stop]), free, strict=True):
        wanted = before.ids[: before.ids.index(stop) + 1] if stop in before.ids else before.ids
        assert completion.ids == wanted
        assert len(completion.logps) == len(wanted)
        assert completion.finish_reason == ("stop" if stop in before.ids else "length")


def test_tokens_stream_in_order_with_their_row(model: Decoder) -> None:
    streamed: dict[int, list[int]] = {}
    options: dict[str, Any] = {"max_new_tokens": 15, "temperature": 1.0, "num_generations": 2, "stop_ids": (7, 8, 9)}
    completions = generate(
        model, PROMPTS, on_token=lambda row, token: streamed.setdefault(row, []).append(token), **options
    )
    assert streamed == {row: completion.ids for row, completion in enumerate(completions)}


def test_equal_prompts_are_computed_once_and_all_told(model: Decoder) -> None:
    streamed: dict[int, list[int]] = {}
    widths: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[0]))
    options: dict[str, Any] = {"max_new_tokens": 5, "temperature": 1.0, "num_generations": 2}
    again = [PROMPTS[0], PROMPTS[2], tuple(PROMPTS[0])]
    completions = generate(
        model, again, on_token=lambda row, token: streamed.setdefault(row, []).append(token), **options
    )
    assert widths == [2, 4, 4, 4, 4]
    assert completions[:4] == generate(model, PROMPTS[::2], **options)
    assert completions[4:] == completions[:2]
    assert completions[4].ids is not completions[0].ids
    assert streamed == {row: completion.ids for row, completion in enumerate(completions)}


def test_one_prefill_a_prompt_one_position_for_the_head_and_rows_that_leave(model: Decoder) -> None:
    """Shapes that the layers and the head see: prompts once, then one token for every row that is still open."""
    layer_shapes: list[tuple[int, ...]] = []
    head_shapes: list[tuple[int, ...]] = []

    def note(shapes: list[tuple[int, ...]]) -> Any:
        def hook(_module: object, inputs: tuple[Tensor, ...], _output: object) -> None:
            shapes.append(tuple(inputs[0].shape))

        return hook

    model.model.layers[0].mlp.register_forward_hook(note(layer_shapes))
    model.lm_head.register_forward_hook(note(head_shapes))
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "num_generations": 3, "stop_ids": range(30)}
    completions = generate(model, PROMPTS, **options)
    D = model.config.hidden_size
    lengths = [len(c.ids) for c in completions]
    open_rows = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert min(lengths) < max(lengths)
    assert layer_shapes == [(4, 11, D), *[(rows, 1, D) for rows in open_rows]]
    assert head_shapes == [(4, D), *[(rows, D) for rows in open_rows]]


def test_the_model_comes_back_in_its_mode_and_no_graph_is_kept(model: Decoder) -> None:
    for mode in (True, False):
        model.train(mode)
        generate(model, [[1]], max_new_tokens=2, on_token=lambda *_: None)
        assert model.training == mode
        with pytest.raises(RuntimeError, match="stop here"):
            generate(model, [[1]], max_new_tokens=2, on_token=_stop)
        assert model.training == mode
    assert all(parameter.grad is None for parameter in model.parameters())


def _stop(row: int, token: int) -> None:
    raise RuntimeError("stop here")


def test_no_prompts_give_no_completions(model: Decoder) -> None:
    assert generate(model, [], max_new_tokens=5) == []


def test_the_context_can_be_filled_to_its_last_position(model: Decoder) -> None:
    assert len(generate(model, [[1] * 4], max_new_tokens=60)[0].ids) == 60


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1, 96]]}, "prompt 0 holds token 96, outside the vocabulary of 96"),
        ({"prompts": [[-1]]}, "prompt 0 holds token -1"),
        ({"prompts": [[1] * 60]}, "prompt 0 has 60 tokens: with max_new_tokens=5 it would leave the context of 64"),
        ({"max_new_tokens": 0}, "must be at least 1, got 0 and 1"),
        ({"num_generations": 0}, "must be at least 1, got 5 and 0"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, "top_p must lie in"),
        ({"top_k": -1}, "top_k must be 0"),
    ],
    ids=str,
)
def test_what_cannot_be_generated_is_refused(changes: dict[str, Any], message: str, model: Decoder) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, **{"prompts": [[1]], "max_new_tokens": 5, **changes})
