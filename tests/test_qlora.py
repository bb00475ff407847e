"""The `qlora` command: what a user gets wrong is one line on stderr and exit code 2, with nothing half-written."""

import json
import shutil
from pathlib import Path

import pytest

import qlora
from data import detect, to_messages
from lora import LoRAConfig, add_adapter, save_adapter
from models import load_model
from tests.small_base import ROWS, write_base, write_rows


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """base/, rows.jsonl, other/ (a base of another width), adapter/ (for other/)."""
    folder = tmp_path_factory.mktemp("made")
    write_base(folder / "base")
    write_rows(folder / "rows.jsonl")
    shutil.copytree(folder / "base", folder / "other")
    config = json.loads((folder / "base" / "config.json").read_text())
    (folder / "other" / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    model = add_adapter(load_model(folder / "base"), LoRAConfig(r=2, target_modules=["q_proj"]))
    save_adapter(model, folder / "adapter")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    shutil.copytree(folder / "adapter", folder / "wide_adapter")
    (folder / "wide_adapter" / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    return folder


def fails(capsys, *argv: object) -> str:
    """The one line that `qlora argv` prints, after checking that it is one and that the exit code is 2."""
    assert qlora.main([str(word) for word in argv]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert said.startswith("qlora"), said
    return said


def sft(made: Path, tmp_path: Path, **flags: object) -> list[object]:
    options = {"data": made / "rows.jsonl", "out": tmp_path / "run", "model": made / "base", "max-steps": 1} | flags
    return ["sft", *(word for flag, value in options.items() for word in (f"--{flag}", value))]


def test_bad_data_is_one_line_and_leaves_no_run(capsys, made, tmp_path):
    bad = tmp_path / "bad.jsonl"
    cases = {
        "": "empty",
        '{"instruction": "a", "output": "b"}\n{"instruction": \n': "line 2",
        '{"instruction": "a", "input": ""}\n': "output",
        '{"messages": [{"role": "robot", "content": "x"}, {"role": "assistant", "content": "y"}]}\n': "robot",
    }
    for text, word in cases.items():
        bad.write_text(text)
        assert word in fails(capsys, *sft(made, tmp_path, data=bad))
        assert not (tmp_path / "run").exists()
    assert "nowhere.jsonl" in fails(capsys, *sft(made, tmp_path, data=tmp_path / "nowhere.jsonl"))


def test_bad_models_are_one_line(capsys, made, tmp_path):
    def with_config(**changes: object) -> Path:
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made / "base", folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    assert "MambaForCausalLM" in fails(
        capsys, "generate", "hi", "--model", with_config(architectures=["MambaForCausalLM"], model_type="mamba")
    )
    assert "mlp" in fails(capsys, "generate", "hi", "--model", made / "other")
    folder = with_config()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in fails(capsys, "generate", "hi", "--model", folder)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF\x03\x00")
    assert "model.gguf" in fails(capsys, "generate", "hi", "--model", gguf)
    assert "adapter" in fails(capsys, "generate", "hi", "--model", made / "base", "--adapter", made / "wide_adapter")
    assert "adapter_config.json" in fails(
        capsys, "generate", "hi", "--model", made / "base", "--adapter", tmp_path / "none"
    )


def test_bad_flags_are_one_line(capsys, made, tmp_path):
    assert "--frobnicate" in fails(capsys, *sft(made, tmp_path, frobnicate=1))
    assert "--out" in fails(capsys, "sft", "--data", made / "rows.jsonl")
    assert "--max-steps" in fails(capsys, *sft(made, tmp_path, **{"max-steps": "many"}))
    assert "--method" in fails(capsys, *sft(made, tmp_path, method="dora"))
    assert "no command 'trian'" in fails(capsys, "trian")
    assert "match no linear layer" in fails(capsys, *sft(made, tmp_path, **{"target-modules": "query"}))
    assert "config.json" in fails(capsys, "sft", "--config", tmp_path / "config.json")


def test_an_output_folder_that_cannot_be_written_is_one_line(capsys, made, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in fails(capsys, *sft(made, tmp_path, out=tmp_path / "file" / "run"))


def test_train_then_generate_probe_and_inspect(capsys, monkeypatch, made, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    flags = {"samples": 0, "r": 2, "method": "lora"}
    assert qlora.main([str(word) for word in sft(made, tmp_path, **flags)]) == 0
    adapter = str(tmp_path / "run" / "adapter")
    assert "1 steps in" in capsys.readouterr().out
    model = ["--model", str(made / "base")]
    assert qlora.main(["generate", "hi", *model, "--adapter", adapter, "--max-new-tokens", "4"]) == 0
    assert (
        qlora.main(["probe", "--data", str(made / "rows.jsonl"), "--rows", "2", "--max-new-tokens", "4", *model]) == 0
    )
    assert "exact match: 0 of 2" in capsys.readouterr().out
    assert qlora.main(["inspect", "data", "--data", str(made / "rows.jsonl"), *model]) == 0
    shown = capsys.readouterr().out
    assert "learnt" in shown
    assert ROWS[0]["output"] in shown
    assert qlora.main(["inspect", "model", "--quantize", "nf4", *model]) == 0
    assert "nf4, blocks of 64, double-quantized" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit, match="0"):
        qlora.main(["sft", "--help"])


def test_an_adapter_is_spoken_to_as_it_was_trained(capsys, monkeypatch, made, tmp_path):
    """The template and the stop ids lie in its folder; a flag wins; which one is used is said."""
    monkeypatch.setenv("COLUMNS", "300")
    flags = {"samples": 0, "r": 2, "method": "lora", "chat-template": "alpaca", "learn": "last"}
    assert qlora.main([str(word) for word in sft(made, tmp_path, **flags)]) == 0
    assert "chat template: alpaca; an answer ends with <|im_end|>; learnt: last" in capsys.readouterr().err
    adapter = tmp_path / "run" / "adapter"
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= {p.name for p in adapter.iterdir()}
    model = ["--model", str(made / "base"), "--max-new-tokens", "2"]
    ask = ["generate", "hi", *model]

    def said(*argv: str) -> str:
        assert qlora.main([*argv]) == 0
        return capsys.readouterr().err

    saved = f"chat template: alpaca; an answer ends with <|im_end|>; saved with {adapter}\n"
    assert said(*ask, "--adapter", str(adapter)) == saved
    assert said("probe", "--data", str(made / "rows.jsonl"), "--rows", "1", *model, "--adapter", str(adapter)) == saved
    monkeypatch.setattr("builtins.input", lambda prompt: "/exit")
    assert said("chat", *model, "--adapter", str(adapter)) == saved
    flag = said(*ask, "--adapter", str(adapter), "--chat-template", "vicuna")
    assert flag == "chat template: vicuna; an answer ends with <|im_end|>; from --chat-template\n"
    flag = said(*ask, "--adapter", str(adapter), "--chat-template", "model")
    assert flag == "chat template: one of its own; an answer ends with <|im_end|>; from --chat-template\n"
    assert said(*ask) == ""
    assert said(*ask, "--adapter", str(made / "adapter")) == ""

    rows = ["inspect", "data", "--data", str(made / "rows.jsonl"), "--model", str(made / "base"), "--rows", "1"]
    assert qlora.main([*rows, "--chat-template", "alpaca", "--learn", "everything"]) == 0
    shown = capsys.readouterr().out
    assert "chat template: alpaca; an answer ends with <|im_end|>" in shown
    assert "### Input:⏎\n0⏎\n⏎\n### Response:⏎\n" + ROWS[0]["output"] in shown


def test_generate_takes_an_input_apart(capsys, monkeypatch, made):
    """With the same words, the Alpaca prompt of a row and of the flags are one."""
    asked = []
    monkeypatch.setattr("commands.generate.encode_prompt", lambda tokenizer, messages: asked.append(messages) or [1])
    ask = ["generate", "Say the number.", "--input", "7", "--model", str(made / "base"), "--max-new-tokens", "1"]
    assert qlora.main(ask) == 0
    row = {"instruction": "Say the number.", "input": "7", "output": "It is 7"}
    assert asked == [to_messages(row, detect([row], "rows"), "row 1")[:-1]]


def test_bad_chat_templates_are_one_line(capsys, made, tmp_path):
    bad = tmp_path / "bad.jinja"
    bad.write_text("a\n{% for %}")
    assert "the names are chatml, llama-3" in fails(capsys, *sft(made, tmp_path, **{"chat-template": "chat-ml"}))
    assert "bad.jinja: chat template, line 2" in fails(capsys, *sft(made, tmp_path, **{"chat-template": bad}))
    bad.write_text("{{ raise_exception('no\n such roles') }}")
    refused = fails(capsys, *sft(made, tmp_path, **{"chat-template": bad}))
    assert "rows.jsonl: row 1: chat template refuses this conversation: no such roles" in refused
    assert not (tmp_path / "run").exists()
    ask = ["generate", "hi", "--model", made / "base"]
    assert qlora.main([*map(str, ask), "--chat-template", str(bad)]) == 2
    used, refused = capsys.readouterr().err.splitlines()
    assert used.endswith("from --chat-template")
    assert refused == "qlora generate: chat template refuses this conversation: no such roles"
    assert "--learn" in fails(capsys, *sft(made, tmp_path, learn="some"))


def test_a_saved_config_starts_the_same_run(made, tmp_path):
    assert qlora.main([str(word) for word in sft(made, tmp_path, samples=0)]) == 0
    again = ["sft", "--config", str(tmp_path / "run" / "config.json"), "--out", str(tmp_path / "again")]
    assert qlora.main(again) == 0
    first, second = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "again")
    )
    assert first == second


def test_chat_streams_and_leaves_at_the_end_of_input(capsys, monkeypatch, made):
    said = iter(["hi", "/clear", "again", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    assert qlora.main(["chat", "--model", str(made / "base"), "--max-new-tokens", "3"]) == 0
    assert list(said) == []
    assert capsys.readouterr().out.count("\n") >= 2
