"""What a finished run leaves: its adapter or model, its curves, its answers to a few held-out prompts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.dataset import Dataset
from data.encode import encode_prompt
from data.schema import to_messages
from lora import save_adapter, without_adapters
from lora.init import takes_from_weight
from models import Decoder, Tokenizer, generate, save_model

from .flags import TrainerFlags
from .metrics import ProgressLine, plot_curves, read_metrics
from .prepare import BASE
from .run import go_on
from .safety import write_aside, writing

LOSS_CURVES = {"loss": "training", "eval_loss": "evaluation"}


def write_weights(flags: TrainerFlags, model: Decoder, tokenizer: Tokenizer, progress: ProgressLine) -> None:
    """The adapter, in PEFT's format, or for method full the model, in transformers'; the tokenizer beside it.

    Raises OSError that says how to go on from the last checkpoint.
    """
    out = Path(flags.out)
    with writing(out / ("model" if flags.method == "full" else "adapter"), f"; {go_on(flags.TRAINER, out)}"):
        _write_weights(flags, out, model, tokenizer, progress)


def _write_weights(
    flags: TrainerFlags, out: Path, model: Decoder, tokenizer: Tokenizer, progress: ProgressLine
) -> None:
    if flags.method == "full":
        save_model(model, out / "model", tokenizer=tokenizer)
        progress.say(f"saved {out / 'model'}")
        return
    base = flags.model
    if flags.method == "qlora" and takes_from_weight(flags.init):
        base = str(out / BASE)
        with without_adapters(model):
            save_model(model, out / BASE, tokenizer=tokenizer)
        progress.say(f"saved {base}, which the adapter belongs to: its start was taken out of the weights")
    save_adapter(model, out / "adapter", base_model_name=base, beside=tokenizer.save)
    progress.say(f"saved {out / 'adapter'}")


def write_plots(out: Path, plots: Mapping[str, tuple[Mapping[str, str], str]], progress: ProgressLine) -> None:
    """plots/NAME.png of metrics.jsonl for each name → ({key of a row: label}, label of the y axis)."""
    rows = read_metrics(out / "metrics.jsonl")
    drawn = [plot_curves(rows, out / "plots" / f"{name}.png", *plot) for name, plot in plots.items()]
    if not all(drawn):
        progress.say("no curve was drawn: matplotlib is not installed (the extra `plot` has it)")


def write_samples(out: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    """samples.jsonl: one JSON object a line."""
    write_aside(out / "samples.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples))


def answers(model: Decoder, tokenizer: Tokenizer, held_out: Dataset, n: int) -> list[dict[str, Any]]:
    """Greedy answers to the first n held-out prompts, beside the answers wanted. Plain text has no prompts."""
    if held_out.schema.kind == "text":
        return []
    rows = held_out.rows[:n]
    conversations = [to_messages(row, held_out.schema, f"row {i}") for i, row in enumerate(rows, start=1)]
    prompts = [encode_prompt(tokenizer, messages[:-1]) for messages in conversations]
    completions = generate(model, prompts, max_new_tokens=128, stop_ids=tokenizer.eos_ids)
    texts = [tokenizer.decode(completion.ids, skip_special_tokens=True) for completion in completions]
    return [
        {"prompt": messages[:-1], "completion": text, "wanted": messages[-1]["content"]}
        for messages, text in zip(conversations, texts, strict=True)
    ]
