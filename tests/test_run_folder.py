"""trainers/run_folder, fingerprint: a resumed run has the model, the chat template and the flags it began with."""

import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.small_base import write_base, write_rows
from trainers import fingerprint, sft
from trainers.fingerprint import fingerprints, model_sha256

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture
def config(tmp_path) -> sft.SFTConfig:
    (tmp_path / "chat.jinja").write_text(TEMPLATE, encoding="utf-8")
    return sft.SFTConfig(
        data=str(write_rows(tmp_path / "rows.jsonl")), out=str(tmp_path / "run"), model=str(write_base(tmp_path / "m")),
        method="lora", r=4, max_steps=2, batch_size=2, accumulation=1, samples=0, threads=1, save_every=1,
        chat_template=str(tmp_path / "chat.jinja"),
    )  # fmt: skip


def resume(config: sft.SFTConfig, **changes) -> None:
    sft.train(replace(config, resume=True, **changes), quiet=True)


def edit(config: sft.SFTConfig, change) -> None:
    """Change the run's config.json."""
    path = Path(config.out) / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    change(saved)
    path.write_text(json.dumps(saved), encoding="utf-8")


def test_other_weights_under_the_same_path_are_refused(config):
    sft.train(config, quiet=True)
    resume(config)
    path = Path(config.model) / "model.safetensors"
    before, weights = path.read_bytes(), load_file(path)
    weights["model.norm.weight"][3] += 2**-20
    save_file(weights, path, metadata={"format": "pt"})
    assert len(path.read_bytes()) == len(before)
    with pytest.raises(ValueError, match=r"config.json has model_sha256 '[0-9a-f]{64}', now it is '[0-9a-f]{64}'"):
        resume(config)
    path.write_bytes(before)
    resume(config)


def test_another_tokenizer_or_chat_template_is_refused(config):
    sft.train(config, quiet=True)
    Path(config.chat_template).write_text(TEMPLATE.replace(": ", " "), encoding="utf-8")
    with pytest.raises(ValueError, match="has chat_template_sha256 "):
        resume(config)
    Path(config.chat_template).write_text(TEMPLATE, encoding="utf-8")
    path = Path(config.model) / "tokenizer_config.json"
    path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")
    with pytest.raises(ValueError, match="has model_sha256 "):
        resume(config)


def test_a_run_from_before_a_flag_existed_resumes_with_the_flags_default_alone(config):
    sft.train(config, quiet=True)

    def forget(saved):
        del saved["config"]["optimizer"], saved["config"]["layers_to_transform"], saved["files"]

    edit(config, forget)
    resume(config)
    with pytest.raises(ValueError, match="has optimizer 'paged_adamw', now it is 'adamw'"):
        resume(config, optimizer="adamw")
    with pytest.raises(ValueError, match=r"has layers_to_transform \[\], now it is \[1\]"):
        resume(config, layers_to_transform=[1])


@pytest.mark.parametrize("text", ["[]", '{"config": 3}', '{"config": {}, "environment": []}', "{"])
def test_a_config_that_is_none_is_named(config, text):
    sft.train(config, quiet=True)
    (Path(config.out) / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"config.json (is not a run's config.json|must be a JSON file)"):
        resume(config)


def test_of_a_large_file_the_header_and_pieces_from_all_over_count(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "WHOLE", 1000)
    monkeypatch.setattr(fingerprint, "HEADER", 100)
    monkeypatch.setattr(fingerprint, "PIECE", 8)
    monkeypatch.setattr(fingerprint, "PIECES", 64)
    path = tmp_path / "model.safetensors"
    data = bytes(range(256)) * 40
    path.write_bytes(data)
    wanted = model_sha256(tmp_path)
    noticed = 0
    for at in range(0, len(data), 16):
        path.write_bytes(data[:at] + bytes(value ^ 255 for value in data[at : at + 160]) + data[at + 160 :])
        noticed += model_sha256(tmp_path) != wanted
    assert noticed == len(data) // 16, "a piece lies in every stretch of 160 bytes"
    path.write_bytes(data + b"0")
    assert model_sha256(tmp_path) != wanted
    path.write_bytes(data)
    assert model_sha256(tmp_path) == wanted


def test_which_flags_name_a_model(config, tmp_path):
    named = fingerprints({"model": config.model, "teacher": config.model, "chat_template": "chatml"})
    assert named.keys() == {"model_sha256", "teacher_sha256"}
    assert fingerprints({"model": config.model, "teacher": None, "chat_template": None}).keys() == {"model_sha256"}
    worn = fingerprints({"teacher": config.model, "teacher_adapter": config.model})
    assert worn.keys() == {"teacher_sha256", "teacher_adapter_sha256"}


def test_the_collector_leaves_out_what_a_run_loaded_until_it_ends_or_fails(config, monkeypatch):
    seen = []

    def fail(*_, **__):
        seen.append(gc.get_freeze_count())
        raise ValueError("stop here")

    monkeypatch.setattr(sft, "train_step", fail)
    with pytest.raises(ValueError, match="stop here"):
        sft.train(config, quiet=True)
    assert seen[0] > 0
    assert gc.get_freeze_count() == 0
