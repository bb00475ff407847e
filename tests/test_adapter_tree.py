"""Several adapters in one folder, as PEFT lays them out: there and back, names that are paths, what is left alone."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lora import (
    LoRAConfig,
    add_adapter,
    load_adapter,
    load_adapters,
    save_adapter,
    save_adapters,
    set_adapter,
    trainable_parameters,
)
from lora.adapters import adapter_layers
from lora.peft_format import CONFIG, WEIGHTS
from tests.test_attach import IDS
from tests.test_lora_whole import BIASED, WHOLE, Model, randomized


def three() -> nn.Module:
    model = randomized(add_adapter(Model(), WHOLE))
    randomized(add_adapter(model, BIASED, "b"))
    return randomized(add_adapter(model, LoRAConfig(r=1), "third-one"))


def test_a_tree_of_adapters(tmp_path: Path) -> None:
    model = three()
    save_adapters(model, tmp_path / "tree")
    assert sorted(p.relative_to(tmp_path / "tree").as_posix() for p in (tmp_path / "tree").rglob("*.json")) == [
        CONFIG,
        f"b/{CONFIG}",
        f"third-one/{CONFIG}",
    ]
    twin = Model()
    assert load_adapters(twin, tmp_path / "tree") == ["default", "b", "third-one"]
    assert twin.adapter_state.active == ("default",)
    assert trainable_parameters(twin) == []
    for name in ("default", "b", "third-one"):
        set_adapter(model, name)
        set_adapter(twin, name)
        assert torch.equal(twin(IDS), model(IDS))
    some = Model()
    assert load_adapters(some, tmp_path / "tree", ["b"], trainable=True) == ["b"]
    assert {name.rsplit(".", 1)[-1] for name, _ in trainable_parameters(some)} == {"b"}
    save_adapters(model, tmp_path / "tree")  # takes the older one's place
    save_adapters(model, tmp_path / "two", ["b", "third-one"])
    assert load_adapters(Model(), tmp_path / "two") == ["b", "third-one"]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_tree_is_not_replaced_by_less(tmp_path: Path) -> None:
    model = three()
    save_adapters(model, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"it holds \['third-one'\]"):
        save_adapters(model, tmp_path, ["default", "b"])
    with pytest.raises(ValueError, match=r"it holds \['b', 'third-one'\]"):
        save_adapter(model, tmp_path)
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"b must be new, .* it holds \['notes.txt'\]"):
        save_adapters(model, tmp_path)
    (tmp_path / "b" / "notes.txt").unlink()
    for names, message in ((["default", "c"], "no adapter is named 'c'"), ([], "at least one adapter must be named")):
        with pytest.raises(ValueError, match=message):
            save_adapters(model, tmp_path, names)
    assert contents(tmp_path) == before


TRICKS = ["", ".", "..", "../x", "/etc", "a/b", "a\\b", "a.b", "~", "a\0b", "con fig", "..\\x", "x\n", "-", "1st"]


@pytest.mark.parametrize("name", TRICKS, ids=repr)
def test_a_name_is_never_a_path(name: str, tmp_path: Path) -> None:
    save_adapters(three(), tmp_path / "tree")
    before = contents(tmp_path)
    model = randomized(add_adapter(Model(), WHOLE))
    for act in (
        lambda: add_adapter(Model(), WHOLE, name),
        lambda: load_adapter(Model(), tmp_path / "tree", name),
        lambda: load_adapters(Model(), tmp_path / "tree", [name]),
        lambda: save_adapters(model, tmp_path / "tree", ["default", name]),
    ):
        with pytest.raises(
            ValueError, match=r"an adapter's name must be|no adapter is named|holds no adapter"
        ) as error:
            act()
        assert "\n" not in str(error.value)
    assert contents(tmp_path) == before


def test_a_tree_with_one_bad_adapter_loads_none(tmp_path: Path) -> None:
    save_adapters(three(), tmp_path)
    (tmp_path / "b" / WEIGHTS).write_bytes(b"")
    model = Model()
    before = [(path, id(module)) for path, module in model.named_modules()]
    with pytest.raises(ValueError, match=r"b/adapter_model.safetensors is not a whole safetensors file"):
        load_adapters(model, tmp_path)
    (tmp_path / "b").rename(tmp_path / "two words")
    with pytest.raises(ValueError, match=r"an adapter's name must be letters, digits and _ or -, .* got 'two words'"):
        load_adapters(model, tmp_path)
    (tmp_path / "two words").rename(tmp_path / "default")
    with pytest.raises(ValueError, match=r"holds two adapters named 'default'"):
        load_adapters(model, tmp_path)
    assert [(path, id(module)) for path, module in model.named_modules()] == before
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no adapter: neither it nor a folder in it has"):
        load_adapters(model, tmp_path / "empty")


def test_adapters_of_a_tree_that_exclude_each_other_are_refused_together(tmp_path: Path) -> None:
    save_adapter(add_adapter(Model(), LoRAConfig(target_modules=["lm_head"])), tmp_path / "tree")
    save_adapter(add_adapter(Model(), LoRAConfig(modules_to_save=["lm_head"])), tmp_path / "tree" / "whole")
    model = Model()
    with pytest.raises(ValueError, match="lm_head would be trained whole, and has an adapter at lm_head"):
        load_adapters(model, tmp_path / "tree")
    assert not adapter_layers(model)
