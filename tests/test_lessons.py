"""Every notebook of lessons/ runs top to bottom in a fresh kernel, is stored with its outputs, and its links lead on."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from commands.grade import exercises

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "lessons").glob("*.ipynb"))
PAGES = sorted((ROOT / "lessons").glob("*.md"))
MAX_BYTES = 200_000


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_the_notebook_runs_top_to_bottom(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cell that raises fails the test. The kernel starts in an empty folder: nothing is left behind in lessons/."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(file, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_the_notebook_is_stored_as_it_ran(file: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run all cells, once, and save"
    assert sum(bool(cell.outputs) for cell in code) >= 3
    errors = [out for cell in code for out in cell.outputs if out.output_type == "error" or out.get("name") == "stderr"]
    assert errors == []
    assert file.stat().st_size < MAX_BYTES


@pytest.mark.parametrize("file", [*PAGES, *NOTEBOOKS], ids=lambda file: file.stem)
def test_every_link_leads_somewhere(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        cells = nbformat.reads(text, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert not [link for link in links if not (file.parent / link).exists()]


@pytest.mark.parametrize("n", exercises())
def test_every_exercise_has_its_notebook_which_names_it(n: int) -> None:
    (notebook,) = (ROOT / "lessons").glob(f"{n:02}_*.ipynb")
    (exercise,) = (ROOT / "lessons/exercises").glob(f"ex{n:02}_*.py")
    last = nbformat.read(notebook, as_version=4).cells[-1].source
    assert f"lessons/exercises/{exercise.name}" in last
    assert f"qlora grade {n}" in last
    assert notebook.name in exercise.read_text(encoding="utf-8")
    assert notebook.name in (ROOT / "lessons/README.md").read_text(encoding="utf-8")
