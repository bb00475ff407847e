"""qlora inspect data: rows as the model will see them, token by token, learnt ones in colour."""

from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from data.dataset import Dataset, read_datasets
from data.encode import LEGEND, Encoded, Learn, encode_dataset, show
from data.flags import DataFlags
from data.formats import describe
from data.preference import EncodedPair, encode_pairs
from models import Tokenizer, load_tokenizer


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
    console = Console(highlight=False)
    if data.schema.kind == "preference":
        show_pairs(args, data, tokenizer, console)
        return
    length = args.max_seq_length
    dataset = encode_dataset(tokenizer, data.rows, data.schema, max_seq_length=length, path=data.path, learn=args.learn)
    introduce(data, str(dataset.report), tokenizer, console)
    for number, example in list(zip(dataset.row_indices, dataset.examples, strict=True))[: args.rows]:
        console.rule(f"row {number + 1}: {len(example.ids)} tokens, {example.n_learnt} learnt")
        console.print(show(tokenizer, example))


def show_pairs(args: InspectDataArgs, data: Dataset, tokenizer: Tokenizer, console: Console) -> None:
    """The prompt once, then the chosen and the rejected answer."""
    dataset = encode_pairs(tokenizer, data.rows, data.schema, max_seq_length=args.max_seq_length, path=data.path)
    introduce(data, str(dataset.report), tokenizer, console)
    for number, pair in list(zip(dataset.row_indices, dataset.pairs, strict=True))[: args.rows]:
        lengths = f"chosen {pair.chosen.n_learnt}, rejected {pair.rejected.n_learnt}"
        console.rule(f"row {number + 1}: a prompt of {pair.prompt_length} tokens, {lengths}")
        for part in parts(pair):
            console.print(show(tokenizer, part))


def parts(pair: EncodedPair) -> list[Encoded]:
    """Prompt, chosen answer, rejected answer."""
    at = pair.prompt_length
    answers = [Encoded(s.ids[at:], s.completion_mask[at:], s.n_truncated) for s in (pair.chosen, pair.rejected)]
    return [Encoded(pair.chosen.ids[:at], [0] * at), *answers]


def introduce(data: Dataset, report: str, tokenizer: Tokenizer, console: Console) -> None:
    console.print(f"{data.path}: {data.schema.explanation}\n{report}\n{describe(tokenizer)}", markup=False)
    console.print(LEGEND)
