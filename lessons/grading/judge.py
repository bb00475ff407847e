"""Grade answers: python -m lessons.grading.judge N FILE [N FILE …]; `qlora grade` starts it.

This process computes what is right, from the repository's own functions, and compares. The student's file runs in
another (student.py), which only answers calls.
"""

import argparse
import ast
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType

from .cases import Forbidden, Student, verdict
from .process import MAX_PRINTED_LINES, StudentError, StudentProcess


@dataclass
class Line:
    """One case, graded."""

    case: str
    right: bool
    message: str = ""


@dataclass
class Report:
    """One exercise, graded."""

    exercise: int
    title: str
    check_version: int
    file: str
    right: bool = False
    stopped: str = ""
    """why no (further) case was run"""
    lines: list[Line] = field(default_factory=list)
    n_cases: int = 0
    printed: list[str] = field(default_factory=list)
    seconds: float = 0.0


def check_of(exercise: int) -> ModuleType:
    return import_module(f"lessons.checks.check{exercise:02}")


def grade(exercise: int, file: Path, **limits: int) -> Report:
    """Grade FILE in a process of its own, under the limits of StudentProcess."""
    check, started = check_of(exercise), time.monotonic()
    report = Report(exercise, check.TITLE, check.VERSION, str(file))
    if not file.is_file():
        report.stopped = f"there is no file {file}"
    else:
        report.stopped = forbidden(file, getattr(check, "MUST_NOT_USE", ())) or ""
    if not report.stopped:
        student = StudentProcess(file, **limits)
        try:
            with student:
                grade_cases(check, student, report)
        except StudentError as error:
            report.stopped = error.text
        report.printed = student.printed
        if student.dropped:
            report.printed.append(f"… and {student.dropped} lines more than the {MAX_PRINTED_LINES} shown")
    report.seconds = round(time.monotonic() - started, 1)
    return report


def grade_cases(check: ModuleType, student: Student, report: Report) -> None:
    """Fill in the report, case by case, as far as the student's file goes."""
    cases = check.cases()
    report.n_cases = len(cases)
    for case in cases:
        try:
            message = verdict(case, case.ask(student))
        except StudentError as error:
            if error.unwritten:
                report.stopped = error.text
                return
            report.lines.append(Line(case.name, False, error.text))
            if error.ends:
                report.stopped = "the cases after it were not run"
                return
        else:
            report.lines.append(Line(case.name, message is None, message or ""))
    report.right = all(line.right for line in report.lines)


def forbidden(file: Path, names: tuple[Forbidden, ...]) -> str | None:
    """The first of `names` that the file uses, as a sentence. Reads the source: a reminder and no wall."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return None  # loading it says where
    for node in ast.walk(tree):
        used = set()
        if isinstance(node, ast.Import):
            used = {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            used = {(node.module or "").partition(".")[0]} | {f".{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            used = {f".{node.attr}"}
        for name in names:
            if name.name in used:
                return f"line {node.lineno} uses {name.name}, which this exercise leaves out: {name.hint}"  # type: ignore[attr-defined]  # only nodes with a line come here
    return None


def text_of(report: Report) -> str:
    """The report for one student's eyes."""
    head = f"exercise {report.exercise}: {report.title} (check version {report.check_version})\n{report.file}"
    rows = []
    for line in report.lines:
        rows.append(f"  {line.case}: {'right' if line.right else 'wrong'}")
        if line.message:
            rows.append(f"      {line.message}")
    printed = [f"  | {line}" for line in report.printed]
    n_right = sum(line.right for line in report.lines)
    end = f"{n_right} of {report.n_cases} cases right" if report.n_cases else "no case was run"
    end += ": the exercise is solved" if report.right else ": not yet"
    return "\n".join([head, *printed, *rows, *([f"  {report.stopped}"] if report.stopped else []), end])


def table_of(reports: list[Report]) -> str:
    """One row an exercise."""
    rows = []
    for report in reports:
        first = next((line.message for line in report.lines if not line.right), report.stopped)
        state = f"{sum(line.right for line in report.lines)} of {report.n_cases}"
        rows.append(f"{report.exercise:>2}  {'right' if report.right else '-':5}  {state:>8}  {report.title}")
        if first:
            rows.append(f"{'':21}{first}")
    n_right = sum(report.right for report in reports)
    return "\n".join([*rows, f"{n_right} of {len(reports)} exercises solved"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="qlora grade", description=__doc__)
    parser.add_argument("answers", nargs="+", help="N FILE, repeated")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--megabytes", type=int, default=1024)
    args = parser.parse_args(argv)
    pairs = list(zip(args.answers[::2], args.answers[1::2], strict=True))
    reports = [grade(int(n), Path(file), seconds=args.seconds, megabytes=args.megabytes) for n, file in pairs]
    if args.json:
        print(json.dumps([asdict(report) for report in reports], indent=1, ensure_ascii=False))
    else:
        print(table_of(reports) if len(reports) > 1 else text_of(reports[0]))
    return 0 if all(report.right for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
