"""qlora inspect data: rows as the model will see them, token by token, learnt ones in colour."""

from dataclasses import dataclass

from rich.console import Console

from data.encode import LEGEND, Learn, encode_dataset, show
from data.formats import describe
from models import load_tokenizer
from trainers.sft import read_dataset


@dataclass(frozen=True)
class InspectDataArgs:
    """Show rows as tokens: what is learnt, what is masked."""

    data: str
    """FILE.jsonl, .json or .csv, or FOLDER:SPLIT."""
    model: str = "smollm2-135m"
    """Whose tokenizer and chat template."""
    chat_template: str | None = None
    """Another chat template: chatml, llama-3, vicuna, chatgpt, alpaca, plain or a Jinja file."""
    learn: Learn = "answers"
    """What the loss counts: every answer with its end token, the last answer alone, or everything."""
    rows: int = 3
    """How many, from the start of the file."""
    max_seq_length: int = 1024
    """Longer rows lose their end."""


def run(args: InspectDataArgs) -> None:
    rows, schema = read_dataset(args.data)
    tokenizer = load_tokenizer(args.model).with_chat_template(args.chat_template)
    length = args.max_seq_length
    dataset = encode_dataset(tokenizer, rows, schema, max_seq_length=length, path=args.data, learn=args.learn)
    console = Console(highlight=False)
    console.print(f"{args.data}: {schema.explanation}\n{dataset.report}\n{describe(tokenizer)}", markup=False)
    console.print(LEGEND)
    for number, example in enumerate(dataset.examples[: args.rows], 1):
        console.rule(f"row {number}: {len(example.ids)} tokens, {example.n_learnt} learnt")
        console.print(show(tokenizer, example))
