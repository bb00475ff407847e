"""qlora probe: run a model on a few rows of a dataset, before training or after. Can it do the task at all?

Shows each prompt with the answer wanted and the answer given, then the loss on the wanted answers and the share of
exact matches (as values, where the wanted answers are JSON; then also the share of right fields).
"""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from data.encode import encode_dataset
from data.schema import to_messages
from trainers.sft import evaluate_loss, read_dataset

from .answers import answer, exact_matches, json_fields
from .loaded import ModelArgs, load


@dataclass(frozen=True)
class ProbeArgs(ModelArgs):
    """Run the model on a few rows of a dataset: can it do the task already?"""

    data: str = ""
    """Rows to try: FILE.jsonl, .json or .csv, or FOLDER:SPLIT."""
    rows: int = 10
    """How many, from the start of the file."""
    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    max_seq_length: int = 1024
    """Longest row for the loss, in tokens."""


def run(args: ProbeArgs) -> None:
    if not args.data:
        raise ValueError("probe needs --data FILE")
    rows, schema = read_dataset(args.data)
    rows = rows[: args.rows]
    conversations = [to_messages(row, schema, f"{args.data}: row {i + 1}") for i, row in enumerate(rows)]
    model, tokenizer = load(args)
    encoded = encode_dataset(tokenizer, rows, schema, max_seq_length=args.max_seq_length, path=args.data)
    answers, _ = answer(model, tokenizer, conversations, max_new_tokens=args.max_new_tokens)
    wanted = [messages[-1]["content"] for messages in conversations]
    right = exact_matches(answers, wanted)

    table = Table("", "prompt", "wanted", "given", show_lines=True)
    for ok, messages, want, got in zip(right, conversations, wanted, answers, strict=True):
        table.add_row("✓" if ok else "✗", messages[-2]["content"], want, got)
    console = Console()
    console.print(table, markup=False)
    loss = evaluate_loss(model, encoded.examples, 4, tokenizer.pad_id)
    fields = json_fields(answers, wanted)
    print(f"loss on the wanted answers: {loss:.4f} nats a token")
    print(
        f"exact match: {sum(right)} of {len(right)}" + ("" if fields is None else f"; JSON fields right: {fields:.0%}")
    )
