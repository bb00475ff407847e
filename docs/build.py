"""The docs as a site: `make docs` writes build/site; open build/site/index.html.

Its pages lie as the repository does, so that a link right in one is right in the other: README.md is the first page,
docs/ and lessons/ follow, every Python module is a page made of its docstrings and its code, every C file one of its
code, and the README's file tree, with a link for each file, is the map. Nothing of ours is imported or run for it. A
link or anchor that leads nowhere ends the build.
"""

import logging
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path

from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import MkDocsException

ROOT = Path(__file__).resolve().parent.parent
PAGES, SITE = ROOT / "build" / "pages", ROOT / "build" / "site"
MODULE_ROOMS = ("quant", "kernels", "lora", "optim", "models", "data", "trainers", "commands", "qlora.py")
CODE = {".py": "python", ".c": "c", ".h": "c"}
LINK = re.compile(r"(?<=\]\()(?![a-z]+://)([^)#\s]+)(?=[)#])")
FILE = re.compile(r"[\w./*-]+\.(?:py|c|h|md|toml|txt)\b|Makefile")


def main() -> int:
    logging.getLogger("mkdocs").addHandler(logging.StreamHandler())  # warnings: which link, in which page
    shutil.rmtree(PAGES, ignore_errors=True)
    files = tracked_files()
    for path in files:
        stage(path, files)
    write("map.md", map_page((ROOT / "README.md").read_text(encoding="utf-8"), files))
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, nav=navigation(files))
    config.plugins.on_startup(command="build", dirty=False)
    try:
        build(config)
    except MkDocsException as error:
        print(f"make docs: {error}", file=sys.stderr)
        return 1
    print(f"make docs: {len(list(SITE.rglob('*.html')))} pages; open {SITE.relative_to(ROOT) / 'index.html'}")
    return 0


def tracked_files() -> list[str]:
    """The files of the repository that are committed or about to be, as posix paths."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [path for path in listed if (ROOT / path).is_file()]


def stage(path: str, files: list[str]) -> None:
    """Write the page of one file, if it has one."""
    source = ROOT / path
    if path.endswith(".md"):
        write(page_of(path), with_links(source.read_text(encoding="utf-8"), path, files))
    elif path.startswith(("docs/", "lessons/")) and source.suffix in (".png", ".ipynb", ".css"):
        (PAGES / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, PAGES / path)
    elif path.startswith(MODULE_ROOMS) and source.suffix == ".py":
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        write(page_of(path), f"# {path}\n\n::: {module}\n")
    elif source.suffix in CODE:
        code = source.read_text(encoding="utf-8")
        write(page_of(path), f"# {path}\n\n````{CODE[source.suffix]}\n{code}\n````\n")


def page_of(path: str) -> str:
    """Where the page of a file lies among the pages."""
    if path == "README.md":
        return "index.md"
    return path + ".md" if Path(path).suffix in CODE else path


def write(page: str, text: str) -> None:
    target = PAGES / page
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")


def with_links(text: str, path: str, files: list[str]) -> str:
    """The page's text, its links to files of the repository leading to their pages, those to folders to the map."""

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), match[1]))
        if target in files:
            return relative(page_of(target), page_of(path))
        is_folder = any(file.startswith(f"{target}/") for file in files)
        return relative("map.md", page_of(path)) if is_folder else match[1]

    return LINK.sub(link, text)


def relative(page: str, start: str) -> str:
    return posixpath.relpath(page, posixpath.dirname(start) or ".")


def map_page(readme: str, files: list[str]) -> str:
    """The file tree of the README, each file's name a link to its page."""
    tree = readme.partition("## File tree\n")[2].partition("```\n")[2].partition("```")[0]
    lines, folder = [], ""
    for line in tree.splitlines():
        name = line.strip().split("  ")[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else posixpath.dirname(name) + "/" if "/" in name else ""
        lines.append(linked(line, folder, files))
    return "# File tree\n\n<pre>\n" + "\n".join(lines) + "\n</pre>\n"


def linked(line: str, folder: str, files: list[str]) -> str:
    def link(match: re.Match[str]) -> str:
        for target in (match[0], folder.removesuffix("/") + "/" + match[0]):
            if target in files and (PAGES / page_of(target)).is_file():
                return f'<a href="{html_of(page_of(target))}">{match[0]}</a>'
        return match[0]

    return FILE.sub(link, line.replace("&", "&amp;").replace("<", "&lt;"))


def html_of(page: str) -> str:
    """A page's address in the site, as seen from the map."""
    return "index.html" if page == "index.md" else page.removesuffix(".md").removesuffix(".ipynb") + ".html"


def navigation(files: list[str]) -> list[dict[str, object]]:
    """The menu: start, map, lessons, docs, experiments."""
    docs = [path for path in files if re.fullmatch(r"docs/\w+\.md", path) and path != "docs/log.md"]
    experiments = [path for path in files if re.fullmatch(r"docs/experiments/\w+\.md", path)]
    lessons = [path for path in files if re.fullmatch(r"lessons/\w+\.(md|ipynb)", path)]
    menu: list[dict[str, object]] = [{"Start": "index.md"}, {"Files": "map.md"}]
    for title, pages in (("Lessons", lessons), ("Docs", docs), ("Experiments", experiments)):
        if pages:
            menu.append({title: sorted(pages, key=lambda page: (not page.endswith("README.md"), page))})
    return [*menu, {"Log": "docs/log.md"}]


if __name__ == "__main__":
    sys.exit(main())
