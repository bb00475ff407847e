"""A base model folder small enough to train in a test: a random Llama with the toy tokenizer's files."""

import json
from pathlib import Path

import torch

from models import Decoder, DecoderConfig, save_model
from tests.toy_tokenizer import CHATML, _trained

ROWS = [
    {"instruction": "Say the number.", "input": str(n), "output": f"It is {n}" + " and more" * (n % 4)}
    for n in range(24)
]


def write_base(folder: Path) -> Path:
    """Write config.json, weights and tokenizer into `folder`, and return it."""
    text = _trained()
    vocab_size = len(json.loads(text)["model"]["vocab"]) + 16
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    save_model(Decoder(config), folder)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    fields = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder


def write_rows(path: Path, rows: list[dict] | None = None) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in (rows or ROWS)]
    path.write_text("".join(lines), encoding="utf-8")
    return path
