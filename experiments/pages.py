"""Where an experiment's rows go: docs/experiments/NAME.csv, NAME.png, and the tables in NAME.md between their marks.

    <!-- table -->  …  <!-- end of table -->              every row of the CSV
    <!-- table: error -->  …  <!-- end of table -->       one that the experiment's `tables` makes of the rows

The words of a page are written by hand; the numbers in its tables by the command that it names. A trial (--quick)
leaves CSV and figure in runs/experiments, and the pages as they are.
"""

import csv
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.results import setting

PAGES = Path(__file__).resolve().parent.parent / "docs" / "experiments"
TRIALS = Path("runs/experiments")
MARKS = re.compile(r"(<!-- table(?:: (?P<name>[\w ]+))? -->\n).*?(<!-- end of table -->)", re.DOTALL)
ABOUT = ("commit", "machine", "python", "torch")

Rows = list[dict[str, str]]
Tables = Callable[[Rows], dict[str, list[dict[str, Any]]]]


def publish(
    name: str,
    rows: list[dict[str, Any]],
    *,
    key: str,
    tables: Tables | None = None,
    draw: Callable[[list[Any], Rows], None] | None = None,
    panels: tuple[int, int] = (1, 1),
    quick: bool = False,
) -> None:
    """Put rows into the CSV in place of those with the same value of `key`, then rewrite tables and figure.

    Old rows with other columns are dropped: another version of the experiment wrote them. panels: rows and columns of
    the figure, whose axes `draw` gets as one list.
    """
    folder = TRIALS if quick else PAGES
    folder.mkdir(parents=True, exist_ok=True)
    replaced = {str(row[key]) for row in rows}
    new = [{field: str(value) for field, value in (row | setting()).items()} for row in rows]
    old = [row for row in read(name, folder) if list(row) == list(new[0]) and row[key] not in replaced]
    all_rows = old + new
    _write(folder / f"{name}.csv", _csv(all_rows))
    page = folder / f"{name}.md"
    if page.is_file():
        _write(page, with_tables(page.read_text(encoding="utf-8"), all_rows, tables))
    if draw is not None:
        _draw(folder / f"{name}.png", all_rows, draw, panels)
    for row in new:
        print(", ".join(f"{field} {value}" for field, value in row.items() if field not in ABOUT))


def read(name: str, folder: Path | None = None) -> Rows:
    """The rows of an experiment; none where it has not run."""
    path = (folder or PAGES) / f"{name}.csv"
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def with_tables(page: str, rows: Rows, tables: Tables | None = None) -> str:
    """The page with its tables filled, and under the last what they were measured on.

    Raises ValueError where the page has other places for tables than the experiment has tables.
    """
    made = tables(rows) if tables else {"": [{k: v for k, v in row.items() if k not in ABOUT} for row in rows]}
    places = [mark.group("name") or "" for mark in MARKS.finditer(page)]
    if sorted(places) != sorted(made):
        raise ValueError(f"an experiment's page must have a place for each of its tables {list(made)}, found {places}")
    measured = sorted({", ".join(f"{field} {row[field]}" for field in ABOUT) for row in rows})
    about = f"\nMeasured on: {'; '.join(measured)}.\n"

    def filled(mark: re.Match[str]) -> str:
        name = mark.group("name") or ""
        return f"{mark.group(1)}{markdown(made[name])}{about if name == places[-1] else ''}{mark.group(3)}"

    return MARKS.sub(filled, page)


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of rows with the same columns."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join([*lines, ""])


def _csv(rows: Rows) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _draw(path: Path, rows: Rows, draw: Callable[..., None], panels: tuple[int, int]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no figure was drawn: matplotlib is not installed (the extra `plot` has it)")
        return
    high, wide = panels
    figure = Figure(figsize=(5 * wide, 4 * high), layout="constrained")
    draw(list(figure.subplots(high, wide, squeeze=False).flat), rows)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=110, format="png")
    os.replace(temporary, path)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
