"""qlora grade: solutions pass, unsolved exercises say what to do, typical mistakes get their hint, and limits hold."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import qlora
from commands.grade import exercises, file_of
from lessons.grading.cases import difference
from lessons.grading.judge import Line, Report, check_of, forbidden, grade, grade_cases, table_of
from lessons.grading.process import StudentError
from lessons.grading.wire import decode, encode
from quant import quantize
from tests.wrong_answers import Wrong

LESSONS = Path(__file__).parents[1] / "lessons"
SOLUTIONS, UNSOLVED = LESSONS / "solutions", LESSONS / "exercises"


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def here(exercise: int, functions: dict[str, Any]) -> Report:
    """Graded in this process: the verdict alone, without what starts and stops the student's process."""

    def student(name: str, *arguments: Any) -> Any:
        try:
            return copy.deepcopy(functions[name](*copy.deepcopy(arguments)))
        except NotImplementedError as error:
            raise StudentError(f"not written yet: {error}", ends=True, unwritten=True) from None
        except Exception as error:
            raise StudentError(f"{type(error).__name__}: {error}") from None

    report = Report(exercise, "", 0, "")
    grade_cases(check_of(exercise), student, report)
    return report


def wrong_answers() -> list[tuple[int, Wrong]]:
    return [(n, w) for n in exercises() for w in importlib.import_module(f"tests.wrong_answers.ex{n:02}").WRONG]


@pytest.mark.parametrize("n", exercises())
def test_the_solution_is_right_and_uses_nothing_forbidden(n: int) -> None:
    file = file_of(n, SOLUTIONS)
    report = here(n, vars(load(file)))
    assert [(line.case, line.message) for line in report.lines if not line.right] == []
    assert report.right
    assert report.n_cases >= 3
    assert forbidden(file, getattr(check_of(n), "MUST_NOT_USE", ())) is None


@pytest.mark.parametrize("n", exercises())
def test_the_unsolved_exercise_says_what_to_do(n: int) -> None:
    file = file_of(n, UNSOLVED)
    report = here(n, vars(load(file)))
    said = re.findall(r'raise NotImplementedError\(\s*f?"(.+?)"', file.read_text(encoding="utf-8"))
    assert not report.right
    assert said
    assert report.stopped.startswith("not written yet: ")
    assert any(text[:40] in report.stopped for text in said)


@pytest.mark.parametrize("n", exercises())
def test_exercise_and_solution_differ_only_in_what_is_to_be_written(n: int) -> None:
    exercise, solution = file_of(n, UNSOLVED), file_of(n, SOLUTIONS)
    assert exercise.name == solution.name
    unsolved, solved = load(exercise), load(solution)
    for name, function in vars(unsolved).items():
        if getattr(function, "__module__", None) == unsolved.__name__:
            assert function.__doc__ == vars(solved)[name].__doc__, name


@pytest.mark.parametrize(("n", "wrong"), [pytest.param(n, w, id=f"{n} {w.__name__}") for n, w in wrong_answers()])
def test_a_typical_mistake_gets_its_hint_at_the_first_wrong_case(n: int, wrong: Wrong) -> None:
    report = here(n, vars(load(file_of(n, SOLUTIONS))) | wrong.functions)
    assert not report.right
    assert wrong.hint in next(line.message for line in report.lines if not line.right)


def test_every_exercise_has_at_least_three_wrong_answers() -> None:
    numbers = [n for n, _ in wrong_answers()]
    assert all(numbers.count(n) >= 3 for n in exercises())


# The student's process


def graded(tmp_path: Path, body: str, **limits: int) -> Report:
    """Exercise 1 with this code in place of the answer, in a process of its own."""
    file = tmp_path / "ex01_mine.py"
    file.write_text("import torch\n" + body)
    return grade(1, file, **limits)


def test_what_the_file_prints_is_shown_and_changes_nothing(tmp_path: Path) -> None:
    body = 'print("6 of 6 cases right: the exercise is solved")\nimport os\nos.write(1, b"right")\n'
    report = graded(tmp_path, body + "def round_to_bf16(x):\n    print('called')\n    return x\n")
    assert not report.right
    assert report.printed[:2] == ["6 of 6 cases right: the exercise is solved", "rightcalled"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("while True: pass", "stopped after 1 s of computing: is there a loop without an end?"),
        ("import time; time.sleep(1000)", "no answer after 2 s. Does it wait for something?"),
        ("x = torch.ones(1 << 33)", "needs more memory than the limit of 300 MB (line 3"),
        ("import os\nwhile True: os.fork()", "graded code may start no process and open no connection (os.fork)"),
        ("import os; os._exit(0)", "the file ended its process (exit code 0)"),
        ("import ctypes; ctypes.string_at(0)", "the file ended its process (signal SIGSEGV)"),
        ("return x.numpy", "a value must be numbers, text, tensors"),
        ("import os, sys; os.write(int(sys.argv[3]), b'x' * 99)", "the file wrote into the grader's channel"),
        ("return x[", "SyntaxError"),
    ],
    ids=lambda text: text[:20],
)
def test_what_goes_wrong_in_the_file_is_one_line(tmp_path: Path, body: str, said: str) -> None:
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    report = graded(
        tmp_path, f"def round_to_bf16(x):\n{lines}\n", seconds=1, megabytes=300, wall=2 if "sleep" in body else 300
    )
    text = " ".join([*(line.message for line in report.lines), report.stopped])
    assert not report.right
    assert said in text
    assert "\n" not in text


def test_prints_without_an_end_are_cut(tmp_path: Path) -> None:
    report = graded(tmp_path, "for i in range(100000): print(i)\ndef round_to_bf16(x): return x\n")
    assert len(report.printed) == 51
    assert report.printed[-1] == "… and 99950 lines more than the 50 shown"


def test_a_forbidden_name_is_refused_with_its_line(tmp_path: Path) -> None:
    report = graded(tmp_path, "def round_to_bf16(x):\n    return x.to(torch.bfloat16).view(torch.int16).int()\n")
    assert report.stopped.startswith("line 3 uses .bfloat16, which this exercise leaves out: ")
    assert report.lines == []
    assert not report.right


# The command


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        qlora.main(["grade", *map(str, arguments)])
    return int(stop.value.code or 0)


def test_report_json_and_exit_codes(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quant.py").write_text("raise ImportError('a file of the student in place of quant')")
    (tmp_path / "ex01_mine.py").write_text((SOLUTIONS / "ex01_sixteen_bits.py").read_text())
    assert run(1, tmp_path) == 0
    said = capfd.readouterr().out
    assert said.startswith(f"exercise 1: {check_of(1).TITLE} (check version {check_of(1).VERSION})\n{tmp_path}")
    assert said.endswith("cases right: the exercise is solved\n")
    assert run("all", tmp_path, "--json") == 1
    first, second, *_ = reports = json.loads(capfd.readouterr().out)
    assert [report["exercise"] for report in reports] == exercises()
    assert (first["right"], first["check_version"]) == (True, check_of(1).VERSION)
    assert (second["right"], second["stopped"]) == (False, f"there is no file {tmp_path}/ex02_*.py")


def test_the_table_shows_what_is_first_wrong() -> None:
    right = Report(1, "first", 1, "a.py", right=True, lines=[Line("case", True)], n_cases=1)
    wrong = Report(2, "second", 1, "b.py", lines=[Line("one", True), Line("two", False, "is 1, expected 2")], n_cases=3)
    assert table_of([right, wrong]).splitlines() == [
        " 1  right    1 of 1  first",
        " 2  -        1 of 3  second",
        "                     is 1, expected 2",
        "1 of 2 exercises solved",
    ]


def test_misuse_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments, said in [
        (["99"], "no exercise '99': there are 1"),
        (["1", str(tmp_path / "none.py")], "there is no file"),
        (["1", str(tmp_path)], r"exercise 1: no file ex01_\*.py in "),
        (["1", "--seconds", "0"], "must be at least 1"),
    ]:
        assert qlora.main(["grade", *arguments]) == 2
        assert re.search(said, capsys.readouterr().err)


def test_the_file_is_found_where_the_student_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert file_of(1, None) == UNSOLVED / "ex01_sixteen_bits.py"
    (tmp_path / "ex01_mine.py").touch()
    assert file_of(1, None) == Path("ex01_mine.py")
    (tmp_path / "ex01_other.py").touch()
    with pytest.raises(ValueError, match=r"exercise 1: 2 files ex01_\*.py"):
        file_of(1, None)


# Values


def test_values_survive_the_pipe() -> None:
    q = quantize(torch.randn(3, 70))
    value = {"a": [1, 2.5, None, "x", True], "b": (torch.ones(2, 3).bfloat16().T, torch.float16), "q": q}
    back = decode(encode(value)[8:])
    assert back["a"] == value["a"]
    assert back["b"][1] is torch.float16
    assert torch.equal(back["b"][0], value["b"][0])
    assert back["b"][0].dtype == torch.bfloat16
    assert back["q"].shape == q.shape
    assert torch.equal(back["q"].packed, q.packed)
    with pytest.raises(ValueError, match="a value must be numbers"):
        encode(object())
    with pytest.raises(ValueError, match="no message"):
        decode(b"xxxxxxxx")


def test_differences_in_words() -> None:
    one = torch.tensor([1.0, 2.0])
    for got, expected, said in [
        (None, one, "must be a tensor, got None: is a return missing?"),
        (one.half(), one, "must be torch.float32, got torch.float16"),
        (one[None], one, r"must have shape \(2,\), got \(1, 2\)"),
        (torch.tensor([1.0, 3.0]), one, r"the answer\[1\] is 3, expected 2; 1 of 2 are wrong"),
        ((1,), (1, 2), "must be 2 values, got a tuple of 1"),
        ({"a": 1}, {"b": 1}, "must be a dict of b, got a dict of 1"),
        (1.5, 1.25, "is 1.5, expected 1.25"),
        (1.0000001, 1.0, "is 1.0000001, expected 1.0"),
        ("x", 1.0, "must be a number, got 'x'"),
        (2, True, "is 2, expected True"),
    ]:
        assert re.search(said, str(difference(got, expected)))
    assert difference((1, {"a": one}), (1, {"a": one.clone()})) is None
    assert difference(one + 1e-3, one, atol=1e-2) is None
    assert difference(torch.tensor([torch.nan, torch.inf]), torch.tensor([torch.nan, torch.inf])) is None
