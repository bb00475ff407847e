"""lora/peft_format.py: what cannot be read or written is one clear line, and changes neither the model nor the disk."""

import json
import math
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora import LoRAConfig, load_adapter, save_adapter, trainable_parameters
from lora.adapters import lora_layers
from lora.peft_format import CONFIG, UNSUPPORTED, WEIGHTS
from tests.test_attach import INSIDE, TinyModel
from tests.test_peft_format import a_model, edit, trained


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good adapter."""
    save_adapter(trained(), tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(folder: Path, message: str, model: nn.Module | None = None) -> None:
    """load_adapter says so in one line, and the model is as it was."""
    model = a_model() if model is None else model
    before = {path: id(module) for path, module in model.named_modules()}
    wanted = {path for path, _ in trainable_parameters(model)}
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(model, folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    assert {path: id(module) for path, module in model.named_modules()} == before
    assert {path for path, _ in trainable_parameters(model)} == wanted


# Files


def test_a_missing_folder_or_file(folder: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", f"must hold {CONFIG}: there is none in .*nowhere")
    (folder / WEIGHTS).unlink()
    refused(folder, f"must hold {WEIGHTS}: there is none in")


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        load_adapter(a_model(), tmp_path / "file")


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_a_truncated_weight_file(folder: Path, kept: int) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:kept])
    refused(folder, f"{WEIGHTS} is not a whole safetensors file")


def test_a_weight_file_of_another_kind(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"PK\x03\x04" + bytes(1000))
    refused(folder, f"{WEIGHTS} is not a whole safetensors file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "must be a JSON file: Expecting value"),
        (b'{"r": 8,', "must be a JSON file: .*line 1 column"),
        (b"[" * 100_000, "must be a JSON file"),
        (b"\xff\xfe", "must be a JSON file: .*utf-8"),
        (b"[1]", "must hold a JSON object, got list"),
        (b'{"r": 8, "r": 16}', "must be a JSON file: the key 'r' stands there twice"),
        (b'{"rank_pattern": {"q": 1, "q": 2}}', "must be a JSON file: the key 'q' stands there twice"),
        (b'{"r": ' + b"9" * 5000 + b"}", "must be a JSON file: Exceeds the limit"),
        (b" " * (1 << 22) + b"{}", "must be a JSON file: a file of at most 4194304 bytes is wanted, this has 4194306"),
        (b"{}", "peft_type must be 'LORA', got None"),
        (b'{"peft_type": "LORA", "lora_alpha": 8}', "must have the field 'r'"),
        (b'{"peft_type": "LORA", "r": 8}', "must have the field 'lora_alpha'"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_malformed_config(folder: Path, text: bytes, message: str) -> None:
    (folder / CONFIG).write_bytes(text)
    refused(folder, f"{CONFIG}:? {message}")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", "8"),
        ("r", 0),
        ("lora_alpha", None),
        ("lora_alpha", float("nan")),
        ("lora_dropout", "a"),
        ("lora_dropout", 1),
        ("target_modules", 5),
        ("target_modules", [5]),
        ("target_modules", "("),
        ("exclude_modules", 3),
        ("rank_pattern", [1]),
        ("rank_pattern", {"(": 1}),
        ("alpha_pattern", {"q_proj": "x"}),
        ("layers_to_transform", "1"),
        ("bias", "some"),
        ("bias", ["all"]),
        ("use_rslora", "yes"),
        ("layers_to_transform", ""),
        ("layers_pattern", 3),
        ("modules_to_save", "norm"),
        ("modules_to_save", [None]),
        ("r", 10**9),
        ("lora_alpha", 10**400),
        ("target_modules", "(a*)*b"),
    ],
)
def test_a_config_field_of_the_wrong_kind_is_named(folder: Path, field: str, value: object) -> None:
    edit(folder, **{field: value})
    names = {"lora_alpha": "alpha", "lora_dropout": "dropout", "alpha_pattern": "q_proj"}
    refused(folder, f"{CONFIG}: LoRA .*{names.get(field, field)}")


# Options


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_an_option_that_changes_the_math_is_refused_by_name(folder: Path, field: str) -> None:
    edit(folder, **{field: {"some": "value"}})
    refused(folder, rf"{CONFIG}: {field}={{'some': 'value'}} changes the math")
    if UNSUPPORTED[field] is False:
        edit(folder, **{field: True})
        refused(folder, f"{CONFIG}: {field}=True changes the math")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga", "mica", "tomorrow"])
def test_a_start_that_changed_the_base_is_refused(folder: Path, init: str) -> None:
    edit(folder, init_lora_weights=init)
    refused(folder, f"{CONFIG}: init_lora_weights='{init}' changes the math")


@pytest.mark.parametrize("field", ["use_tomorrow", "tomorrow_config"])
def test_an_unknown_switch_that_is_on_is_refused(folder: Path, field: str) -> None:
    for off in (None, False, {}):
        edit(folder, **{field: off})
        load_adapter(a_model(), folder)
    edit(folder, **{field: {"x": 1}})
    refused(folder, rf"{CONFIG}: {field}={{'x': 1}} is not known to this version and may change the math")


def test_another_method_is_refused(folder: Path) -> None:
    edit(folder, peft_type="IA3")
    refused(folder, "peft_type must be 'LORA', got 'IA3'")


# Tensors


def with_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


FIRST = f"base_model.model.{INSIDE[0]}"


@pytest.mark.parametrize(
    "key",
    [
        f"{FIRST}.lora_magnitude_vector",
        f"{FIRST}.lora_B.bias",
        f"{FIRST}.base_layer.bias",
        f"{FIRST}.lora_C.weight",
        "base_model.model.model.norm.weight",
    ],
)
def test_an_extra_key_is_refused(folder: Path, key: str) -> None:
    with_tensors(folder, lambda tensors: tensors.update({key: torch.zeros(2)}))
    refused(folder, f"{WEIGHTS}: key '{key}' is none of lora_A, lora_B, .* nothing else is supported")


@pytest.mark.parametrize("key", [f"{INSIDE[0]}.lora_A.weight", "lora_A.weight", f"../{FIRST}.lora_A.weight"])
def test_a_key_without_the_prefix_is_refused(folder: Path, key: str) -> None:
    with_tensors(folder, lambda tensors: tensors.update({key: torch.zeros(2)}))
    refused(folder, f"{WEIGHTS}: key '{key}' must begin with 'base_model.model.'")


def test_a_head_that_is_not_this_base_s_is_refused(folder: Path) -> None:
    """PEFT adds the head and the embeddings where it thinks they changed. A mere copy is nothing new."""
    head = {"base_model.model.lm_head.weight": a_model().lm_head.weight.detach().clone()}
    with_tensors(folder, lambda tensors: tensors.update(head))
    load_adapter(a_model(), folder)
    head["base_model.model.lm_head.weight"][0, 0] += 1
    with_tensors(folder, lambda tensors: tensors.update(head))
    refused(folder, "adapter for another base model: lm_head.base_layer.weight is not this one's weight")


def test_half_an_adapter_is_refused(folder: Path) -> None:
    with_tensors(folder, lambda tensors: tensors.pop(f"{FIRST}.lora_B.weight"))
    refused(folder, rf"{INSIDE[0]} must have both lora_A and lora_B, found \['lora_A'\]")


def test_half_an_embedding_s_adapter_is_refused(folder: Path) -> None:
    key = "base_model.model.model.embed_tokens.lora_embedding_B"
    with_tensors(folder, lambda tensors: tensors.update({key: torch.zeros(8, 3)}))
    refused(folder, "embed_tokens must have both lora_embedding_A and lora_embedding_B, found .'lora_embedding_B'")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(folder: Path, value: float) -> None:
    with_tensors(folder, lambda tensors: tensors[f"{FIRST}.lora_B.weight"].view(-1)[-1].fill_(value))
    refused(folder, f"{WEIGHTS}: {FIRST}.lora_B.weight must hold finite numbers, it has NaN or infinity")


def test_a_key_that_stands_twice_in_the_header_is_refused(folder: Path) -> None:
    """The library takes the last one."""
    data = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    key = f"{FIRST}.lora_A.weight"
    text = json.dumps(header)[:-1] + f', "{key}": {json.dumps(header[key])}' + "}"
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text.encode() + data[8 + size :])
    refused(folder, f"{WEIGHTS} is not a whole safetensors file: the key '{key}' stands there twice")


def test_a_pipe_where_a_file_should_be_does_not_hang(folder: Path) -> None:
    (folder / CONFIG).unlink()
    os.mkfifo(folder / CONFIG)
    refused(folder, f"{CONFIG} must be a JSON file")


def test_no_tensors_at_all_are_refused(folder: Path) -> None:
    with_tensors(folder, dict.clear)
    refused(folder, f"{WEIGHTS} holds no adapter weights")


def test_weights_that_are_no_floats_are_refused(folder: Path) -> None:
    with_tensors(folder, lambda tensors: tensors.update({f"{FIRST}.lora_A.weight": torch.ones(3, 8, dtype=torch.int8)}))
    refused(folder, f"{FIRST}.lora_A.weight must hold .*got torch.int8")


# Another base


def deeper() -> TinyModel:
    model = a_model()
    model.model.layers.extend(a_model().model.layers)
    return model


def test_a_layer_that_this_base_does_not_have(folder: Path) -> None:
    model = a_model()
    del model.model.layers[1]
    refused(folder, r"adapter for another base model: this one has no linear layer model\.layers\.1\.", model)


def test_a_base_with_more_layers(folder: Path) -> None:
    missing = "model.layers.2.self_attn.q_proj"
    refused(folder, f"adapter for another base model: it has no weights for {missing}, one of its targets", deeper())


def test_an_adapter_for_some_layers_fits_a_base_with_more(tmp_path: Path) -> None:
    save_adapter(trained(LoRAConfig(layers_to_transform=(0, 1))), tmp_path / "adapter")
    assert list(lora_layers(load_adapter(deeper(), tmp_path / "adapter"))) == INSIDE


def test_a_base_of_another_width(folder: Path) -> None:
    model = a_model()
    model.model.layers[0].mlp.up_proj = nn.Linear(8, 16, bias=False)
    wanted = r"model.layers.0.mlp.up_proj needs A and B of \(3, 8\) and \(16, 3\), got \(3, 8\) and \(12, 3\)"
    refused(folder, f"adapter for another base model: {wanted}", model)


def test_a_rank_that_is_not_the_config_s(folder: Path) -> None:
    edit(folder, r=4)
    refused(folder, rf"{INSIDE[3]} has rank 3 in {WEIGHTS}, and 4 by the fields of {CONFIG}")


# Writing


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_output_folder_that_cannot_be(folder: Path) -> None:
    before = contents(folder)
    for place in (folder / CONFIG, folder / CONFIG / "below"):  # a file, and a file as the parent
        with pytest.raises(OSError, match=CONFIG):
            save_adapter(trained(), place)
    assert contents(folder) == before


def test_a_folder_with_something_else_in_it_is_left_alone(folder: Path) -> None:
    (folder / "README.md").write_text("PEFT writes one")
    save_adapter(trained(), folder)
    (folder / "thesis.tex").write_text("years of work")
    before = contents(folder)
    with pytest.raises(
        ValueError, match=r"must be new, empty or an adapter's folder to be written, it holds \['thesis"
    ):
        save_adapter(trained(), folder)
    assert contents(folder) == before


def test_a_full_disk_leaves_the_older_adapter_and_nothing_else(folder: Path) -> None:
    before = contents(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # no file may grow beyond 1000 bytes
    try:
        with pytest.raises(OSError, match=f"{WEIGHTS} cannot be written"):
            save_adapter(trained(), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(folder.parent) == {f"adapter/{name}": data for name, data in before.items()}
