"""qlora inspect data: rows as the model will see them, token by token, learnt ones in colour."""

from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from data.dataset import read_datasets
from data.encode import LEGEND, Learn, encode_dataset, show
from data.flags import DataFlags
from data.formats import describe
from models import load_tokenizer


@dataclass(frozen=True)
class InspectDataArgs(DataFlags):
    """Show rows as tokens: what is learnt, what is masked."""

    model: str = "smollm2-135m"
    """Whose tokenizer and chat template."""
    chat_template: str | None = None
    """Another chat template: chatml, llama-3, vicuna, chatgpt, alpaca, plain or a Jinja file."""
    learn: Learn = "answers"
    """What the loss counts: every answer with its end token, the last answer alone, or everything."""
    rows: int = 3
    """How many examples, from the first."""
    part: Literal["train", "eval"] = "train"
    """Of the rows that train, or of those held out."""
    max_seq_length: int = 1024
    """Longer rows lose their end; plain text is cut into pieces of this length."""


def run(args: InspectDataArgs) -> None:
    if args.rows < 1:
        raise ValueError(f"--rows must be at least 1, got {args.rows}")
    training, held_out = read_datasets(args)
    if args.part == "eval" and held_out is None:
        raise ValueError("--part eval: no rows are held out; give --eval-data, --eval-fraction or --eval-where")
    data = training if held_out is None or args.part == "train" else held_out
    tokenizer = load_tokenizer(args.model).with_chat_template(args.chat_template)
    length = args.max_seq_length
    dataset = encode_dataset(tokenizer, data.rows, data.schema, max_seq_length=length, path=data.path, learn=args.learn)
    console = Console(highlight=False)
    console.print(f"{data.path}: {data.schema.explanation}\n{dataset.report}\n{describe(tokenizer)}", markup=False)
    console.print(LEGEND)
    for number, example in list(zip(dataset.row_indices, dataset.examples, strict=True))[: args.rows]:
        console.rule(f"row {number + 1}: {len(example.ids)} tokens, {example.n_learnt} learnt")
        console.print(show(tokenizer, example))
