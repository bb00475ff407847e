"""qlora grade: an exercise of lessons/ against the repository's own functions, in a process of its own."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("lessons/exercises", "exercises", ".")


@dataclass(frozen=True)
class GradeArgs:
    """Grade an exercise. Exit code 0: right; 1: not yet; 2: no such exercise or file."""

    exercise: tyro.conf.Positional[str]
    """its number, or `all`"""
    file: tyro.conf.Positional[Path | None] = None
    """your file (for `all`: the folder of your files); else exNN_*.py in lessons/exercises, exercises or this folder,
    else this repository's"""
    json: bool = False
    """print what a program can read: a list of reports"""
    seconds: int = 20
    """processor time that one exercise may take"""
    megabytes: int = 1024
    """memory that it may take beyond what torch holds (Linux)"""


def run(args: GradeArgs) -> None:
    """Exits with 1 when an answer is not right yet. Raises ValueError for an unknown exercise or a missing file."""
    if args.seconds < 1 or args.megabytes < 1:
        raise ValueError("--seconds and --megabytes must be at least 1")
    if args.exercise == "all":
        files = {n: file_of(n, args.file, missing_ok=True) for n in exercises()}
    else:
        files = {(n := number(args.exercise)): file_of(n, args.file)}
    answers = [part for n, file in files.items() for part in (str(n), str(file))]
    limits = ["--seconds", str(args.seconds), "--megabytes", str(args.megabytes), *(["--json"] if args.json else [])]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}  # a student's own quant.py is not ours
    command = [sys.executable, "-m", "lessons.grading.judge", *limits, "--", *answers]
    raise SystemExit(subprocess.run(command, env=environment, check=False).returncode)


def exercises() -> list[int]:
    """The numbers there are."""
    return sorted(int(path.stem.removeprefix("check")) for path in (ROOT / "lessons/checks").glob("check*.py"))


def number(text: str) -> int:
    if not text.isdecimal() or int(text) not in exercises():
        raise ValueError(f"no exercise {text!r}: there are {', '.join(map(str, exercises()))}, and `all`")
    return int(text)


def file_of(n: int, given: Path | None, *, missing_ok: bool = False) -> Path:
    """The file to grade as exercise n; with missing_ok, a pattern in place of one that is not there."""
    if given is not None and given.is_file():
        return given
    if given is not None and not given.is_dir():
        raise ValueError(f"there is no file {given}")
    folders = [given] if given is not None else [*map(Path, PLACES), ROOT / "lessons/exercises"]
    found = [sorted(folder.glob(f"ex{n:02}_*.py")) for folder in folders]
    files = next((files for files in found if files), [])
    if not files and missing_ok:
        return folders[0] / f"ex{n:02}_*.py"
    if len(files) != 1:
        there = f"{len(files)} files" if files else "no file"
        raise ValueError(f"exercise {n}: {there} ex{n:02}_*.py in {' or '.join(map(str, folders))}")
    return files[0]
