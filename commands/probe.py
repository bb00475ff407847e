"""qlora probe: run a model on a few rows of a dataset, before training or after. Can it do the task at all?

Shows each prompt with the answer wanted and the answer given, then the loss on the wanted answers and the share of
exact matches (as values, where the wanted answers are JSON; then also the share of right fields). Where rows are held
out, those are tried. Plain text has no answers: its loss and perplexity are shown.
"""

import math
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from data.dataset import Dataset, read_datasets
from data.encode import encode_dataset
from data.flags import DataFlags
from data.schema import to_messages
from models import Decoder, Tokenizer
from trainers.sft import evaluate_loss

from .answers import answer, exact_matches, json_fields
from .loaded import ModelArgs, load


@dataclass(frozen=True)
class ProbeArgs(ModelArgs, DataFlags):
    """Run the model on a few rows of a dataset: can it do the task already?"""

    rows: int = 10
    """How many, from the start of the file."""
    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    max_seq_length: int = 1024
    """Longest row for the loss, in tokens."""


def run(args: ProbeArgs) -> None:
    if args.rows < 1:
        raise ValueError(f"--rows must be at least 1, got {args.rows}")
    training, held_out = read_datasets(args)
    data = held_out or training
    data = replace(data, rows=data.rows[: args.rows])
    print(f"{data.path}: {data.schema.explanation}")
    if data.schema.kind == "text":
        model, tokenizer = load(args)
        loss = _loss(args, data, model, tokenizer)
        print(f"loss: {loss:.4f} nats a token; perplexity {math.exp(loss):.2f}")
        return
    conversations = [to_messages(row, data.schema, f"{data.path}: row {i + 1}") for i, row in enumerate(data.rows)]
    model, tokenizer = load(args)
    loss = _loss(args, data, model, tokenizer)
    answers, _ = answer(model, tokenizer, conversations, max_new_tokens=args.max_new_tokens)
    wanted = [messages[-1]["content"] for messages in conversations]
    right = exact_matches(answers, wanted)

    table = Table("", "prompt", "wanted", "given", show_lines=True)
    for ok, messages, want, got in zip(right, conversations, wanted, answers, strict=True):
        table.add_row("✓" if ok else "✗", messages[-2]["content"], want, got)
    Console().print(table, markup=False)
    fields = json_fields(answers, wanted)
    print(f"loss on the wanted answers: {loss:.4f} nats a token")
    print(
        f"exact match: {sum(right)} of {len(right)}" + ("" if fields is None else f"; JSON fields right: {fields:.0%}")
    )


def _loss(args: ProbeArgs, data: Dataset, model: Decoder, tokenizer: Tokenizer) -> float:
    """Mean loss per learnt token, in nats."""
    encoded = encode_dataset(tokenizer, data.rows, data.schema, max_seq_length=args.max_seq_length, path=data.path)
    return evaluate_loss(model, encoded.examples, 4, tokenizer.pad_id)
