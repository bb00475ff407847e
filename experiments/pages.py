"""Where an experiment's rows go: docs/experiments/NAME.csv, NAME.png, and the table in NAME.md between its marks.

    <!-- table -->  …  <!-- end of table -->

The words of a page are written by hand; its numbers by the command that it names.
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
MARKS = re.compile(r"(<!-- table -->\n).*?(<!-- end of table -->)", re.DOTALL)
ABOUT = ("commit", "machine", "python", "torch")


def publish(
    name: str,
    rows: list[dict[str, Any]],
    *,
    key: str,
    draw: Callable[[list[Any], list[dict[str, str]]], None] | None = None,
    panels: int = 3,
) -> None:
    """Put rows into the CSV in place of those with the same value of `key`, then rewrite table and figure."""
    PAGES.mkdir(parents=True, exist_ok=True)
    replaced = {str(row[key]) for row in rows}
    new = [{field: str(value) for field, value in (row | setting()).items()} for row in rows]
    all_rows = [row for row in read(name) if row[key] not in replaced] + new
    _write(PAGES / f"{name}.csv", _csv(all_rows))
    page = PAGES / f"{name}.md"
    if page.is_file():
        _write(page, with_table(page.read_text(encoding="utf-8"), all_rows))
    if draw is not None:
        _draw(PAGES / f"{name}.png", all_rows, draw, panels)
    for row in new:
        print(", ".join(f"{field} {value}" for field, value in row.items() if field not in ABOUT))


def read(name: str) -> list[dict[str, str]]:
    """The rows of an experiment; none where it has not run."""
    path = PAGES / f"{name}.csv"
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def with_table(page: str, rows: list[dict[str, str]]) -> str:
    """The page with the rows between its marks. Raises ValueError where it has none."""
    columns = [field for field in rows[0] if field not in ABOUT]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row[field] for field in columns) + " |" for row in rows]
    measured = sorted({", ".join(f"{field} {row[field]}" for field in ABOUT) for row in rows})
    text = "\n".join([*lines, "", f"Measured on: {'; '.join(measured)}.", ""])
    filled, n = MARKS.subn(lambda mark: f"{mark.group(1)}{text}{mark.group(2)}", page)
    if n != 1:
        raise ValueError(f"an experiment's page must have one place for its table, found {n}")
    return filled


def _csv(rows: list[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _draw(path: Path, rows: list[dict[str, str]], draw: Callable[..., None], panels: int) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no figure was drawn: matplotlib is not installed (the extra `plot` has it)")
        return
    figure = Figure(figsize=(5 * panels, 4), layout="constrained")
    axes = figure.subplots(1, panels)
    draw(list(axes) if panels > 1 else [axes], rows)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=110, format="png")
    os.replace(temporary, path)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
