"""What a finished run leaves: its adapter or model, its loss curve, its answers to a few held-out prompts."""

import json
from pathlib import Path
from typing import Any

from data.dataset import Dataset
from data.encode import encode_prompt
from data.schema import Schema, to_messages
from lora import save_adapter
from models import Decoder, Tokenizer, generate, save_model

from .metrics import ProgressLine, plot_loss, read_metrics
from .sft_config import SFTConfig


def write_results(
    config: SFTConfig,
    model: Decoder,
    tokenizer: Tokenizer,
    metrics: Path,
    held_out: Dataset | None,
    progress: ProgressLine,
) -> None:
    """Write what the run made: weights, loss curve, and answers to some held-out prompts."""
    out = Path(config.out)
    if config.method == "full":
        save_model(model, out / "model", tokenizer=tokenizer)
        progress.say(f"saved {out / 'model'}")
    else:
        save_adapter(model, out / "adapter", base_model_name=config.model, beside=tokenizer.save)
        progress.say(f"saved {out / 'adapter'}")
    if not plot_loss(read_metrics(metrics), out / "plots" / "loss.png"):
        progress.say("no loss curve was drawn: matplotlib is not installed (the extra `plot` has it)")
    if held_out is not None and held_out.schema.kind != "text" and config.samples:
        _write_samples(out / "samples.jsonl", model, tokenizer, held_out.rows[: config.samples], held_out.schema)


def _write_samples(
    path: Path, model: Decoder, tokenizer: Tokenizer, rows: list[dict[str, Any]], schema: Schema
) -> None:
    """Answers to a few held-out prompts, greedy, beside the answers wanted. Plain text has no prompts."""
    conversations = [to_messages(row, schema, f"row {i + 1}") for i, row in enumerate(rows)]
    prompts = [encode_prompt(tokenizer, messages[:-1]) for messages in conversations]
    model.eval()
    completions = generate(model, prompts, max_new_tokens=128, stop_ids=tokenizer.eos_ids)
    lines = []
    for messages, completion in zip(conversations, completions, strict=True):
        answer = tokenizer.decode(completion.ids, skip_special_tokens=True)
        sample = {"prompt": messages[:-1], "completion": answer, "wanted": messages[-1]["content"]}
        lines.append(json.dumps(sample, ensure_ascii=False))
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(path)
