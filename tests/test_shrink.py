"""models/shrink.py: the layers that stay, their windows and rope, the cache, and the folder that it saves."""

import copy

import pytest
import torch

import qlora
from lora import LoRAConfig, add_adapter
from models import generate, load_model, load_tokenizer, save_model
from models.shrink import evenly, shrink
from tests.small_base import write_base
from tests.small_llama import EVERY, small_decoder


@pytest.mark.parametrize(
    ("layers", "keep", "kept"),
    [
        (30, 15, [0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29]),
        (4, 2, [0, 3]),
        (5, 5, [0, 1, 2, 3, 4]),
        (7, 1, [0]),
        (3, 2, [0, 2]),
    ],
)
def test_layers_are_spread_evenly_with_both_ends(layers: int, keep: int, kept: list[int]) -> None:
    assert evenly(layers, keep) == kept


def test_every_number_of_layers_to_keep_gives_as_many_in_order() -> None:
    for layers in range(1, 40):
        for keep in range(1, layers + 1):
            assert len(set(evenly(layers, keep))) == keep


@pytest.mark.parametrize("family", EVERY)
def test_it_is_the_forward_without_the_layers_left_out(family: str, tmp_path) -> None:
    """By hand: the middle layers become identities. With and without a cache, and again from the saved folder."""
    model = small_decoder(**EVERY[family])
    n = model.config.num_hidden_layers
    by_hand = copy.deepcopy(model)
    for layer in by_hand.model.layers[1:-1]:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
        for bias in (layer.self_attn.o_proj.bias, layer.mlp.down_proj.bias):
            if bias is not None:
                bias.data.zero_()
    small = shrink(model, [0, n - 1])
    assert small is model
    assert small.config.num_hidden_layers == len(small.model.layers) == 2
    ids = torch.randint(96, (2, 11))
    torch.testing.assert_close(small(ids), by_hand(ids))
    options = {"max_new_tokens": 6, "stop_ids": ()}
    wanted = generate(by_hand, ids.tolist(), **options)
    assert [c.ids for c in generate(small, ids.tolist(), **options)] == [c.ids for c in wanted]
    save_model(small, tmp_path / "small")
    assert torch.equal(load_model(tmp_path / "small").eval()(ids), small(ids))


def test_a_shrunk_4_bit_model_is_saved_in_4_bits(tmp_path) -> None:
    write_base(tmp_path / "base")
    model = shrink(load_model(tmp_path / "base", quantize="nf4", blocksize=32), [1])
    save_model(model, tmp_path / "small")
    ids = torch.arange(9)[None]
    assert torch.equal(load_model(tmp_path / "small").eval()(ids), model.eval()(ids))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0, "a model of 2 layers can keep between 1 and 2 of them, got 0"),
        (3, "can keep between 1 and 2 of them, got 3"),
        ([], r"must rise and lie between 0 and 1, got \[\]"),
        ([1, 0], r"must rise and lie between 0 and 1, got \[1, 0\]"),
        ([0, 0], r"must rise and lie between 0 and 1, got \[0, 0\]"),
        ([0, 2], r"must rise and lie between 0 and 1, got \[0, 2\]"),
    ],
)
def test_layers_that_a_model_lacks_are_refused(keep: int | list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shrink(small_decoder(), keep)


def test_a_model_with_an_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="q_proj wears one"):
        shrink(add_adapter(small_decoder(), LoRAConfig(r=2, target_modules=["q_proj"])), 1)


def test_the_command_writes_a_model_with_its_tokenizer(tmp_path, capsys) -> None:
    write_base(tmp_path / "base")
    assert qlora.main(["shrink", str(tmp_path / "base"), str(tmp_path / "half"), "--layers", "1"]) == 0
    said = capsys.readouterr().out
    assert f"layers 0 of {tmp_path / 'base'}" in said
    whole, half = load_model(tmp_path / "base"), load_model(tmp_path / "half")
    for name, parameter in half.named_parameters():
        assert torch.equal(parameter, dict(whole.named_parameters())[name])
    text = "Hello <|im_end|>"
    assert load_tokenizer(tmp_path / "half").encode(text) == load_tokenizer(tmp_path / "base").encode(text)
    assert qlora.main(["shrink", str(tmp_path / "base"), str(tmp_path / "none"), "--layers", "9"]) == 2
    assert capsys.readouterr().err.strip().endswith("can keep between 1 and 2 of them, got 9")
    assert not (tmp_path / "none").exists()
