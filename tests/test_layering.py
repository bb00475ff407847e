"""The rooms of the house: who may import whom, peers only as oracles, small files, no pickle. Read by AST."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 400

MAY_IMPORT = {
    "quant": set(),
    "kernels": {"quant"},
    "optim": {"quant", "kernels"},
    "lora": {"quant", "kernels"},
    "data": set(),
    "models": {"quant", "kernels", "lora", "data"},
    "trainers": {"quant", "kernels", "optim", "lora", "data", "models"},
    "commands": {"quant", "kernels", "optim", "lora", "data", "models", "trainers"},
    "qlora": {"quant", "kernels", "optim", "lora", "data", "models", "trainers", "commands"},
}
OURS = {*MAY_IMPORT, "tests", "benchmarks", "experiments", "lessons"}
PEERS = {"transformers", "peft", "trl", "bitsandbytes", "accelerate"}
PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "joblib", "marshal"}


def files_of(room: str) -> list[Path]:
    single = ROOT / f"{room}.py"
    return [single] if single.exists() else sorted((ROOT / room).rglob("*.py"))


SHIPPED = [path for room in MAY_IMPORT for path in files_of(room)]
ALL = SHIPPED + [path for folder in ("tests", "benchmarks", "experiments", "lessons") for path in files_of(folder)]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, top-level name) of every absolute import, at the top or inside a function, by statement or by call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called in {"__import__", "importlib.import_module", "import_module"}:
                yield node.lineno, str(node.args[0].value).partition(".")[0]


def forbidden_imports(room: str, source: str) -> list[tuple[int, str]]:
    """Imports of ours that this room may not make, and of peers."""
    allowed = MAY_IMPORT[room] | {room}
    return [(line, name) for line, name in imports(ast.parse(source)) if name in (OURS | PEERS) - allowed]


def pickling(source: str) -> list[int]:
    """Lines that import a module which pickles, or name torch.load or torch.save."""
    tree = ast.parse(source)
    lines = [line for line, name in imports(tree) if name in PICKLERS]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.load", "torch.save"}:
            lines.append(node.lineno)
        if (
            isinstance(node, ast.ImportFrom)
            and node.module == "torch"
            and {"load", "save"} & {a.name for a in node.names}
        ):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_every_room_imports_only_the_rooms_below_it_and_no_peer(room: str) -> None:
    files = files_of(room)
    assert files, f"{room} has no files"
    found = [
        f"{relative(path)}:{line} imports {name}"
        for path in files
        for line, name in forbidden_imports(room, path.read_text(encoding="utf-8"))
    ]
    assert not found


def test_a_relative_import_stays_in_its_room() -> None:
    found = []
    for path in SHIPPED:
        depth = len(path.relative_to(ROOT).parts) - 1
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level > depth:
                found.append(f"{relative(path)}:{node.lineno}")
    assert not found


def test_tests_and_benchmarks_are_imported_by_no_one_but_themselves() -> None:
    found = [
        f"{relative(path)}:{line} imports {name}"
        for path in SHIPPED
        for line, name in imports(ast.parse(path.read_text(encoding="utf-8")))
        if name in {"tests", "benchmarks", "experiments", "lessons"}
    ]
    assert not found


def test_lessons_use_what_is_taught_and_nothing_else() -> None:
    """Exercises and notebooks import our rooms; graded code never reaches tests, benchmarks or peers."""
    allowed = set(MAY_IMPORT) | {"lessons"}
    notebooks = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "lessons").glob("*.ipynb"))]
    cells = ["".join(cell["source"]) for book in notebooks for cell in book["cells"] if cell["cell_type"] == "code"]
    plain = ["\n".join(line for line in cell.splitlines() if line[:1] not in ("%", "!")) for cell in cells]
    sources = [path.read_text(encoding="utf-8") for path in files_of("lessons")] + plain
    assert len(sources) > 5
    assert not [name for text in sources for _, name in imports(ast.parse(text)) if name in (OURS | PEERS) - allowed]


def test_peers_have_tests_of_their_own_and_are_imported_nowhere_else_in_the_tests() -> None:
    oracles = [path for folder in ("tests/peers", "benchmarks") for path in files_of(folder)]
    found = [
        f"{relative(path)}:{line} imports {name}"
        for path in ALL
        if path not in oracles
        for line, name in imports(ast.parse(path.read_text(encoding="utf-8")))
        if name in PEERS
    ]
    assert not found


def test_nothing_is_pickled() -> None:
    found = [f"{relative(path)}:{line}" for path in SHIPPED for line in pickling(path.read_text(encoding="utf-8"))]
    assert not found


def test_files_stay_small_enough_to_hold_one_concept() -> None:
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in ALL}
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


def test_reference_math_imports_nothing_of_ours_nor_torch() -> None:
    for path in (ROOT / "tests").glob("reference*.py"):
        names = {name for _, name in imports(ast.parse(path.read_text(encoding="utf-8")))}
        assert not names & (OURS | PEERS | {"torch", "numpy"}), path.name


@pytest.mark.parametrize(
    "line",
    [
        "import lora",
        "import lora.linear as x",
        "from lora import LoRALinear",
        "def f():\n    from trainers.sft import run",
        "import transformers",
        "importlib.import_module('peft')",
        "from tests import reference",
    ],
)
def test_the_import_check_sees_a_planted_import(line: str) -> None:
    assert forbidden_imports("kernels", line)
    assert not forbidden_imports("kernels", "from quant import quantize\nfrom . import lora\nimport kernels.matmul")


@pytest.mark.parametrize(
    "line",
    [  # text that the check must find, parsed and never run: a check that finds nothing would pass without it
        "import pickle",  # the reason above: no pickle is read or written anywhere
        "torch.load('x')",  # text only, as above
        "from torch import load",
        "f = torch.save",
        "from pickle import loads",
    ],
)
def test_the_pickle_check_sees_a_planted_one(line: str) -> None:
    assert pickling(line)
    assert not pickling("safetensors.torch.load_file('x')\njson.load(f)\nself.load(x)")
