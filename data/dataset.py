"""From the data flags to the rows that train and the rows held out.

    file ──▶ rows ──▶ split ──▶ conversations of one turn ──▶ merged into several ──▶ encode

Each step that was taken adds a clause to the schema's sentence, so that whoever prints it says all that was done.
Where rows are split or merged, they become messages first, while their number is still their place in the file.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .conversations import MAX_TURNS, merge_turns
from .flags import DataFlags, schema_of
from .preference import to_pair
from .schema import Schema, to_messages, to_text
from .sources import Row, read_rows
from .split import by_fraction, by_value, commonest, shared, values_of


@dataclass(frozen=True)
class Dataset:
    """Rows, what they mean, and the name that begins every error about them."""

    rows: list[Row]
    schema: Schema
    path: str


def read_datasets(flags: DataFlags) -> tuple[Dataset, Dataset | None]:
    """(training rows, held-out rows or None). Raises ValueError for a bad file, row or flag."""
    _check(flags)
    whole = _read(flags.data, flags)
    numbers, held_numbers = _sides(whole.rows, flags)
    training, held_out = whole, None
    if len(numbers) < len(whole.rows):
        checked, note = _in_messages(whole), _split_note(whole.rows, numbers, held_numbers, flags)
        training = _part(checked, numbers, "training rows", note)
        held_out = _part(checked, held_numbers, "held-out rows", note) if held_numbers else None
    if flags.eval_data is not None:
        held_out = _read(flags.eval_data, flags)
        n, of = shared([whole.rows[i] for i in numbers], held_out.rows), len(held_out.rows)
        training = (
            _noted(training, f"{n:,} of the {of:,} held-out rows also train, so that they tell little")
            if n
            else training
        )
    return _merged(training, flags), _merged(held_out, flags) if held_out else None


def _read(path: str, flags: DataFlags) -> Dataset:
    rows = read_rows(path)
    return Dataset(rows, schema_of(flags, rows, path), path)


def _check(flags: DataFlags) -> None:
    ways = {"--eval-data": flags.eval_data, "--eval-fraction": flags.eval_fraction, "--eval-where": flags.eval_where}
    given = [flag for flag, value in ways.items() if value]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} both say what is held out: give one of them")
    if not 1 <= flags.turns <= MAX_TURNS:
        raise ValueError(f"--turns must lie between 1 and {MAX_TURNS}, got {flags.turns}")
    if flags.eval_fraction and not 0 < flags.eval_fraction < 1:
        raise ValueError(f"--eval-fraction must lie between 0 and 1, got {flags.eval_fraction}")


def _sides(rows: Sequence[Row], flags: DataFlags) -> tuple[list[int], list[int]]:
    """(numbers of the training rows, numbers of the held-out rows), disjoint."""
    every = list(range(len(rows)))
    candidates = by_value(rows, flags.train_where, "--train-where", flags.data) if flags.train_where else every
    if flags.eval_where:
        held_out = by_value(rows, flags.eval_where, "--eval-where", flags.data)
        chosen = set(held_out)
        training = [i for i in candidates if i not in chosen]
        if not training:
            raise ValueError(f"{flags.data}: --eval-where {flags.eval_where} leaves no row to train on")
        return training, held_out
    if flags.eval_fraction:
        some = [rows[i] for i in candidates]
        training, held_out = by_fraction(some, flags.eval_fraction, flags.data_seed, flags.data)
        return [candidates[i] for i in training], [candidates[i] for i in held_out]
    return candidates, []


def _split_note(rows: Sequence[Row], training: list[int], held_out: list[int], flags: DataFlags) -> str:
    """How many rows are on which side, and why; where only --eval-where says so, also what else trains."""
    seeded = f"{flags.eval_fraction:g} at random, seed {flags.data_seed}" if flags.eval_fraction else ""
    how = ", ".join(filter(None, [flags.train_where, flags.eval_where, seeded]))
    note = f"{len(training):,} of {len(rows):,} rows train, {len(held_out):,} are held out ({how})"
    if flags.eval_where and not flags.train_where:
        column = flags.eval_where.partition("=")[0]
        values = values_of(rows, column, flags.data)
        note += f"; {column} of those that train: {commonest([values[i] for i in training])}"
    return note


def _in_messages(dataset: Dataset) -> Dataset:
    """The same rows as {messages}, {text} or pairs: bad ones are found while their number is that of the file."""
    schema, path = dataset.schema, dataset.path
    if schema.kind == "text":
        texts = [{"text": to_text(row, schema, f"{path}: row {i}")} for i, row in enumerate(dataset.rows, start=1)]
        return replace(dataset, rows=texts, schema=Schema("text", schema.explanation))
    if schema.kind == "preference":
        pairs = [to_pair(row, schema, f"{path}: row {i}") for i, row in enumerate(dataset.rows, start=1)]
        rows: list[Row] = [pair._asdict() for pair in pairs]
        return replace(dataset, rows=rows, schema=Schema("preference", schema.explanation))
    rows = [{"messages": to_messages(row, schema, f"{path}: row {i}")} for i, row in enumerate(dataset.rows, start=1)]
    return replace(dataset, rows=rows, schema=Schema("messages", schema.explanation))


def _part(dataset: Dataset, numbers: Sequence[int], name: str, note: str) -> Dataset:
    rows = [dataset.rows[i] for i in numbers]
    return _noted(replace(dataset, rows=rows, path=f"{dataset.path} ({name})"), note)


def _merged(dataset: Dataset, flags: DataFlags) -> Dataset:
    """Conversations of `turns` turns, if asked for."""
    if flags.turns == 1:
        return dataset
    if dataset.schema.kind in ("text", "preference"):
        raise ValueError(f"--turns: {'plain text has' if dataset.schema.kind == 'text' else 'pairs have'} no turns")
    single = [row["messages"] for row in _in_messages(dataset).rows]
    merged = merge_turns(single, flags.turns, flags.data_seed, reuse=flags.row_reuse, path=dataset.path)
    times = f"{flags.turns} times" if flags.row_reuse else "once"
    note = (
        f"{len(single):,} rows merged at random (seed {flags.data_seed}) into {len(merged):,} conversations of "
        f"{flags.turns} turns, each row used {times} an epoch"
    )
    rows: list[Row] = [{"messages": messages} for messages in merged]
    return _noted(
        Dataset(rows, Schema("messages", dataset.schema.explanation), f"{dataset.path} (merged conversations)"), note
    )


def _noted(dataset: Dataset, note: str) -> Dataset:
    schema = replace(dataset.schema, explanation=f"{dataset.schema.explanation}; {note}")
    return replace(dataset, schema=schema)
