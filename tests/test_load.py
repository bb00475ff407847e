"""models/load.py and its formats: every weight arrives where it belongs, to the bit, and loading in 4 bits gives the
codes of the dense weight without ever holding a dense layer. What is damaged: test_load_errors.py."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

import models.load
import quant
from lora import LinearNF4, count_parameters
from models import generate, load_model, save_model
from models.gguf_format import read_header, read_rows
from tests.small_llama import (
    LLAMA3,
    SETTINGS,
    assert_same,
    change_tensors,
    gguf_names,
    gguf_writer,
    small_decoder,
    write_gguf,
)

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model as save_model writes it."""
    save_model(small_decoder(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.usefixtures("row_chunks")
def test_a_folder_comes_back_to_the_bit(setting: str, tmp_path: Path) -> None:
    model = small_decoder(**SETTINGS[setting])
    for shard in (10**9, 30_000):
        save_model(model, tmp_path / "m", max_shard_bytes=shard)
        assert_same(load_model(tmp_path / "m"), model)
    assert load_model(tmp_path / "m").config == model.config


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s != "linear rope"])
@pytest.mark.usefixtures("row_chunks")
def test_a_gguf_file_comes_back_to_the_bit(setting: str, tmp_path: Path) -> None:
    """In llama.cpp's row order and names; llama3's scaling by its factors."""
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


def test_rope_factors_of_one_are_no_scaling(tmp_path: Path) -> None:
    write_gguf(small_decoder(rope=type(LLAMA3)("llama3", 500.0, 1.0, 1.0, 4.0, 8192)), tmp_path / "m.gguf")
    assert load_model(tmp_path / "m.gguf").config.rope == type(LLAMA3)(theta=500.0)


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


def test_a_head_in_4_bits_is_a_copy_and_the_embeddings_stay(tmp_path: Path) -> None:
    for tied in (True, False):
        model = small_decoder(tie_word_embeddings=tied)
        save_model(model, tmp_path / "m")
        loaded = load_model(tmp_path / "m", quantize="nf4", head="fp4", blocksize=32, double_quant=False)
        wanted = quant.quantize(model.lm_head.weight.detach(), quant_type="fp4", blocksize=32, double_quant=False)
        assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
        hidden = torch.randn(3, model.config.hidden_size)
        found, plain = loaded.logits(hidden), hidden @ quant.dequantize(wanted).T
        assert (found - plain).abs().max() <= 100 * torch.finfo(torch.float32).eps * plain.abs().max()
        assert generate(loaded, [[1, 2]], max_new_tokens=3)[0].finish_reason == "length"
        save_model(load_model(tmp_path / "m", quantize="nf4", head="nf4"), tmp_path / "again")
        again = load_model(tmp_path / "again")
        assert isinstance(again.lm_head, LinearNF4)


def test_a_head_in_bf16_is_a_copy_and_its_logits_are_of_its_exact_values(tmp_path: Path) -> None:
    for tied in (True, False):
        model = small_decoder(tie_word_embeddings=tied)
        save_model(model, tmp_path / "m")
        loaded = load_model(tmp_path / "m", head="bf16")
        assert loaded.model.embed_tokens.weight.dtype == torch.float32
        weight = model.lm_head.weight.detach().bfloat16()
        assert torch.equal(loaded.lm_head.weight, weight)
        hidden = torch.randn(3, model.config.hidden_size)
        plain = hidden @ weight.float().T
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                found = loaded.logits(hidden)
            assert (found - plain).abs().max() <= 100 * torch.finfo(torch.float32).eps * plain.abs().max()
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
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    model = load_model(source, quantize="nf4")
    done = True
    thread.join()
    held = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    rows.append({"over the model": peak - before - sum(held.values()), "model": sum(held.values())})
print(json.dumps(rows))
"""


def sparse_gguf(path: Path, kind: Kind, **sizes: int) -> int:
    """As sparse_folder, every matrix in blocks of `kind`."""
    with torch.device("meta"):
        model = small_decoder(num_hidden_layers=1, **sizes)
    writer = gguf_writer(model.config, path)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    end = 0
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim == 2
        nbytes = parameter.numel() // block * block_bytes if matrix else 4 * parameter.numel()
        stored = gguf_names(model)[name]
        writer.add_tensor_info(stored, parameter.shape, np.float32, nbytes, raw_dtype=kind if matrix else Kind.F32)
        end += -(-nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + 32 + end)
    return max(4 * parameter.numel() for parameter in model.parameters())


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
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
    sparse_gguf(tmp_path / "sparse.gguf", Kind.Q6_K, hidden_size=1024, intermediate_size=16_384, **heads)
    sources = ["smollm2-135m", str(tmp_path / "sparse"), str(tmp_path / "sparse.gguf")]
    command = [sys.executable, "-c", MEASURE, str(folder), *sources]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    smollm2, *sparse = json.loads(result.stdout)
    assert smollm2["over the model"] <= 200_000_000
    assert max(source["over the model"] for source in sparse) <= min(largest, 200_000_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int8"}, "quantize must be None, nf4 or fp4, got 'int8'"),
        ({"head": "fp16"}, "head must be None, bf16, nf4 or fp4, got 'fp16'"),
        ({"quantize": "nf4", "blocksize": 100}, "blocksize must be one of 32, 64, .* got 100"),
        ({"dtype": torch.float64}, "dtype must be float32, bfloat16 or float16, got float64"),
        ({"dtype": torch.int8}, "got int8"),
    ],
    ids=str,
)
def test_options_outside_their_range(options: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(folder, **options)
