"""lora/peft_format.py without PEFT: the two files, and bits through a round trip.

That PEFT reads and writes the same is checked in tests/peers/test_peft.py, what is refused in test_peft_errors.py.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lora import (
    LoRAConfig,
    add_adapter,
    load_adapter,
    quantize_model,
    save_adapter,
    set_adapter,
    trainable_parameters,
)
from lora.adapters import lora_layers
from lora.peft_format import CONFIG, WEIGHTS
from tests.test_attach import IDS, INSIDE, TinyModel, randomize_b


def a_model() -> TinyModel:
    """The same base each time."""
    torch.manual_seed(1)
    return TinyModel()


def trained(config: LoRAConfig | None = None, name: str = "default") -> nn.Module:
    model = add_adapter(a_model(), config or LoRAConfig(r=3, alpha=5), name)
    randomize_b(model)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good adapter."""
    save_adapter(trained(), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder: Path, **fields) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# What is written


def test_keys_shapes_and_dtypes(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]
    tensors = load_file(folder / WEIGHTS)
    layers = {path: a_model().get_submodule(path) for path in INSIDE}
    expected = {f"base_model.model.{p}.lora_A.weight": (3, layer.in_features) for p, layer in layers.items()}
    expected |= {f"base_model.model.{p}.lora_B.weight": (layer.out_features, 3) for p, layer in layers.items()}
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    with safe_open(folder / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_config_is_peft_s_fields(tmp_path: Path) -> None:
    config = LoRAConfig(
        r=3,
        alpha=5,
        dropout=0.1,
        target_modules=("q_proj", "up_proj"),
        exclude_modules=r".*\.1\.mlp.*",
        use_rslora=True,
        init="gaussian",
        rank_pattern={"q_proj": 2},
        alpha_pattern={"up_proj": 7},
        layers_to_transform=(0, 1),
    )
    save_adapter(trained(config), tmp_path, base_model_name="someone/base")
    assert json.loads((tmp_path / CONFIG).read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "someone/base",
        "r": 3,
        "lora_alpha": 5,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "up_proj"],
        "exclude_modules": r".*\.1\.mlp.*",
        "bias": "none",
        "use_rslora": True,
        "use_dora": False,
        "init_lora_weights": "gaussian",
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"up_proj": 7},
        "layers_to_transform": [0, 1],
        "layers_pattern": None,
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def test_all_linear_is_written_as_names(folder: Path) -> None:
    """PEFT does so too: the shorthand means another set on another model."""
    assert json.loads((folder / CONFIG).read_text())["target_modules"] == ["down_proj", "q_proj", "up_proj", "v_proj"]


def test_writing_twice_gives_the_same_bytes(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    save_adapter(trained(), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_only_the_named_adapter_is_written(tmp_path: Path) -> None:
    model = trained(LoRAConfig(r=3, target_modules=["q_proj"]), "first")
    add_adapter(model, LoRAConfig(r=2, target_modules=["up_proj"]), "second")
    save_adapter(model, tmp_path / "first", "first")
    assert all("q_proj" in key for key in load_file(tmp_path / "first" / WEIGHTS))
    with pytest.raises(ValueError, match=r"no adapter is named 'third': the model has \['first', 'second'\]"):
        save_adapter(model, tmp_path / "third", "third")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first"]


# There and back


CONFIGS = [
    LoRAConfig(r=3, alpha=5),
    LoRAConfig(r=4, alpha=6, use_rslora=True, dropout=0.5, init="gaussian"),
    LoRAConfig(r=2, target_modules=("q_proj", "lm_head")),
    LoRAConfig(r=2, target_modules=r".*\.1\..*_proj"),
    LoRAConfig(r=2, exclude_modules=("mlp.up_proj",), layers_to_transform=(1,)),
    LoRAConfig(r=2, rank_pattern={r"layers\.0\..*": 5}, alpha_pattern={"q_proj": 3, "down_proj": 0.5}),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_a_round_trip_gives_the_same_bits_and_bytes(config: LoRAConfig, quantized: bool, tmp_path: Path) -> None:
    model, twin = (quantize_model(a_model()) if quantized else a_model() for _ in range(2))
    add_adapter(model, config, "mine")
    randomize_b(model)
    save_adapter(model.eval(), tmp_path / "one", "mine")
    assert load_adapter(twin.eval(), tmp_path / "one") is twin
    assert torch.equal(twin(IDS), model(IDS))
    assert lora_layers(twin).keys() == lora_layers(model).keys()
    for path, layer in lora_layers(twin).items():
        ours = lora_layers(model)[path]
        assert layer.scaling["default"] == ours.scaling["mine"]
        assert layer.dropout["default"] == config.dropout
        assert torch.equal(layer.lora_A["default"], ours.lora_A["mine"])
        assert torch.equal(layer.lora_B["default"], ours.lora_B["mine"])
    save_adapter(twin, tmp_path / "two")
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()


def test_a_loaded_adapter_is_frozen_unless_asked(folder: Path) -> None:
    assert trainable_parameters(load_adapter(a_model(), folder)) == []
    model = load_adapter(a_model(), folder, trainable=True)
    assert len(trainable_parameters(model)) == 2 * len(INSIDE)
    model(IDS).sum().backward()
    assert all(p.grad is not None for _, p in trainable_parameters(model))


def test_several_adapters_load_beside_each_other(tmp_path: Path) -> None:
    configs = {"a": CONFIGS[0], "b": CONFIGS[1]}
    logits = {}
    for name, config in configs.items():
        model = trained(config, name)
        save_adapter(model, tmp_path / name, name)
        logits[name] = model.eval()(IDS)
    model = a_model().eval()
    for name in configs:
        load_adapter(model, tmp_path / name, name)
    for name in configs:
        set_adapter(model, name)
        assert torch.equal(model(IDS), logits[name])
    with pytest.raises(ValueError, match="'a' is on this model already"):
        load_adapter(model, tmp_path / "a", "a")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_float_dtypes_are_read_into_fp32(folder: Path, dtype: torch.dtype) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    layer = lora_layers(load_adapter(a_model(), folder))[INSIDE[0]]
    assert layer.lora_A["default"].dtype == torch.float32
    assert torch.equal(layer.lora_A["default"].to(dtype), tensors[f"base_model.model.{INSIDE[0]}.lora_A.weight"])


def test_fields_that_change_nothing_are_ignored(folder: Path) -> None:
    model = load_adapter(a_model(), folder)
    edit(folder, revision="main", a_field_of_tomorrow={"x": 1}, megatron_core="megatron.core", lora_bias=None)
    edit(folder, trainable_token_indices=[], layer_replication=None, init_lora_weights="orthogonal", task_type=None)
    assert torch.equal(load_adapter(a_model(), folder)(IDS), model(IDS))


def test_targets_that_are_not_named_are_those_the_file_holds(tmp_path: Path) -> None:
    """And the adapter is written again with the paths themselves."""
    model = trained(LoRAConfig(r=2, layers_to_transform=(1,), layers_pattern="layers"))
    save_adapter(model, tmp_path / "one")
    assert json.loads((tmp_path / "one" / CONFIG).read_text())["layers_pattern"] == "layers"
    edit(tmp_path / "one", target_modules=None)
    again = load_adapter(a_model(), tmp_path / "one")
    assert torch.equal(again(IDS), model(IDS))
    save_adapter(again, tmp_path / "two")
    fields = json.loads((tmp_path / "two" / CONFIG).read_text())
    assert sorted(fields["target_modules"]) == sorted(path for path in INSIDE if ".1." in path)
    assert (fields["layers_to_transform"], fields["layers_pattern"]) == (None, None)


def test_one_layer_number_is_a_list_of_one(tmp_path: Path) -> None:
    save_adapter(trained(LoRAConfig(r=2, layers_to_transform=(1,))), tmp_path / "one")
    edit(tmp_path / "one", layers_to_transform=1)
    model = load_adapter(a_model(), tmp_path / "one")
    assert list(lora_layers(model)) == [path for path in INSIDE if ".1." in path]
    assert model.adapter_state.configs["default"].layers_to_transform == [1]
