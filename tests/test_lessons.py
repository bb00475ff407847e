"""Every notebook of lessons/ runs top to bottom in a fresh kernel, and is stored with its outputs."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "lessons").glob("*.ipynb"))
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
