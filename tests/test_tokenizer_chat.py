"""models/tokenizer.py: another chat template than the model's own, and the one saved beside an adapter."""

import json
from pathlib import Path
from typing import Any

import pytest

from models import load_tokenizer
from tests.toy_tokenizer import CHATML, _trained


def folder_of(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(_trained(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_another_template_makes_another_tokenizer(tmp_path: Path) -> None:
    first = load_tokenizer(folder_of(tmp_path, {"eos_token": "</s>", "chat_template": "{{ messages[0].content }}"}))
    other = first.with_chat_template("chatml")
    ends = [first.special_tokens[token] for token in ("</s>", "<|im_end|>")]
    assert (first.eos_ids, other.eos_ids) == ((ends[0],), tuple(ends))
    assert first.chat_template == "{{ messages[0].content }}"
    assert other.with_chat_template(None) is other
    assert first.with_chat_template("model").chat_template == first.chat_template
    question = [{"role": "user", "content": "Hé"}]
    text = "<|im_start|>user\nHé<|im_end|>\n"
    assert other.decode(other.apply_chat_template(question)) == text
    assert first.decode(first.apply_chat_template(question)) == "Hé"
    with pytest.raises(ValueError, match="--chat-template chat-ml: there is no such file, and the names are chatml, "):
        first.with_chat_template("chat-ml")


@pytest.mark.parametrize("choice", ["chatml", "vicuna", "alpaca", "plain"])
def test_what_is_saved_beside_an_adapter_is_taken(choice: str, tmp_path: Path) -> None:
    first = load_tokenizer(folder_of(tmp_path / "base", {"eos_token": "</s>"}))
    trained = first.with_chat_template(choice)
    (tmp_path / "adapter").mkdir()
    trained.save(tmp_path / "adapter")
    again = first.with_chat_of(tmp_path / "adapter")
    for name in ("chat_template", "bos_token", "eos_token", "eos_ids", "pad_id", "adds_bos"):
        assert getattr(again, name) == getattr(trained, name), name
    assert load_tokenizer(tmp_path / "adapter").eos_ids == trained.eos_ids


def test_what_an_adapters_folder_does_not_say_stays(tmp_path: Path) -> None:
    first = load_tokenizer(folder_of(tmp_path / "base", {"eos_token": "</s>", "chat_template": CHATML}))
    (tmp_path / "adapter").mkdir()
    again = first.with_chat_of(tmp_path / "adapter")
    assert (again.chat_template, again.eos_ids) == (first.chat_template, first.eos_ids)
    (tmp_path / "adapter" / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert first.with_chat_of(tmp_path / "adapter").eos_ids == (first.special_tokens["<|im_end|>"],)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "tokenizer_config.json",
            b'{"eos_token": "<nowhere>"}',
            "eos_token is '<nowhere>', which the vocabulary lacks",
        ),
        ("tokenizer_config.json", b'{"chat_template": [', "tokenizer_config.json"),
        ("generation_config.json", b'{"eos_token_id": [2, 99999]}', "eos_token_id in .* is 99999, no id of this vocab"),
        ("generation_config.json", b'{"eos_token_id": [[2]]}', "eos_token_id must be an id or a list of ids"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: a chat template must be text in UTF-8"),
    ],
)
def test_a_damaged_chat_beside_an_adapter_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    first = load_tokenizer(folder_of(tmp_path / "base", {"eos_token": "</s>"}))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        first.with_chat_of(tmp_path / "adapter")
    assert str(tmp_path / "adapter") in str(caught.value)
