"""docs/build.py: links keep their meaning in the site, the map links every file, a link that leads nowhere ends it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """docs/build.py for a repository of its own: a README, a page, a module."""
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for path, text in {
        "README.md": "# Start\n\n[page](docs/page.md#part) [code](quant/a.py) [all](kernels/)\n\n## File tree\n\n"
        "```\nquant/a.py   one\nkernels/cpu/        two\n  b.h          three\n```\n",
        "docs/page.md": "# Page\n\n## Part\n\n[start](../README.md), [elsewhere](https://example.org/a.md)\n",
        "docs/log.md": "# Log\n",
        "docs/site.css": "",
        "quant/__init__.py": "",
        "quant/a.py": '"""One thing.\n\n    y = x²\n"""\n\ndef f(x):\n    """x squared."""\n    return x**2\n',
        "kernels/cpu/b.h": "int b;\n",
        "mkdocs.yml": (ROOT / "mkdocs.yml").read_text(encoding="utf-8"),
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    for name, value in (("ROOT", ""), ("PAGES", "build/pages"), ("SITE", "build/site")):
        monkeypatch.setattr(module, name, tmp_path / value)
    return module


@pytest.mark.filterwarnings("default")  # mkdocs and its plugins warn about one another
def test_the_site_is_built_and_its_links_lead_somewhere(site: ModuleType) -> None:
    assert site.main() == 0
    index, page, code, tree = (
        (site.SITE / name).read_text(encoding="utf-8")
        for name in ("index.html", "docs/page.html", "quant/a.py.html", "map.html")
    )
    assert 'href="docs/page.html#part"' in index
    assert 'href="quant/a.py.html"' in index
    assert 'href="map.html">all</a>' in index
    assert 'href="../index.html"' in page
    assert "https://example.org/a.md" in page
    assert "y = x²" in code
    assert "x squared." in code
    linked = re.findall(r'<a href="([\w./]+)">', tree.partition("<pre>")[2].partition("</pre>")[0])
    assert linked == ["quant/a.py.html", "kernels/cpu/b.h.html"]
    assert all((site.SITE / name).is_file() for name in linked)


@pytest.mark.filterwarnings("default")  # mkdocs and its plugins warn about one another
@pytest.mark.parametrize("link", ["docs/none.md", "docs/page.md#none", "quant/none.py"])
def test_a_link_that_leads_nowhere_ends_it(
    site: ModuleType, link: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    (site.ROOT / "README.md").write_text(f"# Start\n\n[dead]({link})\n\n## File tree\n\n```\n```\n", encoding="utf-8")
    assert site.main() == 1
    assert "make docs: Aborted with 1 warnings in strict mode!" in capsys.readouterr().err
    assert f"contains a link '{link}'" in caplog.text
