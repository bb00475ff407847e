"""The process that runs the student's file. It knows no answers: it is sent arguments and sends back what comes out.

    python -m lessons.grading.student FILE READ_FD WRITE_FD SECONDS MEGABYTES

Nothing that the file prints or does here can change the verdict, which another process reaches. Limits are set before
the file is loaded: processor time, memory beyond what torch holds, size of files; no processes, no network.
"""

import importlib.util
import os
import resource
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import torch

from .wire import decode, encode

STUDENT_MODULE = "student_answer"
MAX_FILE_BYTES = 1 << 24
NOT_ALLOWED = (
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.exec",
    "os.system",
    "os.kill",
    "subprocess.Popen",
    "socket.",
)
NO_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory")


def main(argv: list[str]) -> None:
    file, read_fd, write_fd, seconds, megabytes = argv
    torch.set_num_threads(1)
    with os.fdopen(int(read_fd), "rb") as calls, os.fdopen(int(write_fd), "wb") as answers:
        limit(int(seconds), int(megabytes))
        answer(answers, lambda: {"loaded": load(Path(file)) is not None})
        while head := calls.read(8):
            call = decode(calls.read(int.from_bytes(head, "big")))
            answer(answers, lambda call=call: {"value": run(call["function"], call["arguments"])})


def limit(seconds: int, megabytes: int) -> None:
    """From now on."""
    sys.addaudithook(_refuse)
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    _set(resource.RLIMIT_CPU, int(used) + 1 + seconds, grace=2)  # SIGXCPU, and 2 s later SIGKILL
    _set(resource.RLIMIT_FSIZE, MAX_FILE_BYTES)
    _set(resource.RLIMIT_CORE, 0)
    pages = Path("/proc/self/statm")
    if pages.exists():  # Linux: macOS takes RLIMIT_AS and does not keep it
        held = int(pages.read_text().split()[0]) * resource.getpagesize()
        _set(resource.RLIMIT_AS, held + (megabytes << 20))


def _set(kind: int, value: int, grace: int = 0) -> None:
    hard = resource.getrlimit(kind)[1]
    highest = value + grace if hard == resource.RLIM_INFINITY else min(value + grace, hard)
    resource.setrlimit(kind, (min(value, highest), highest))


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event.startswith(NOT_ALLOWED):
        raise PermissionError(f"graded code may start no process and open no connection ({event})")


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(STUDENT_MODULE, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[STUDENT_MODULE] = module
    spec.loader.exec_module(module)
    return module


def run(name: str, arguments: list[Any]) -> Any:
    function = getattr(sys.modules[STUDENT_MODULE], name, None)
    if not callable(function):
        raise ValueError(f"the file has no function {name}")
    return function(*arguments)


def answer(answers: BinaryIO, compute: Any) -> None:
    """Send what compute() returns, or what it raised and where in the student's file."""
    try:
        message = encode(compute())
    except BaseException as error:  # SystemExit and KeyboardInterrupt of the student's code too: it is only reported
        message = encode({"error": describe(error)})
    sys.stdout.flush()
    sys.stderr.flush()
    answers.write(message)
    answers.flush()


def describe(error: BaseException) -> dict[str, Any]:
    """kind, text, and the last line of the student's file that led there."""
    module = sys.modules.get(STUDENT_MODULE)
    file = getattr(module, "__file__", None)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    text = " ".join(str(error).split())
    if isinstance(error, SyntaxError):
        where = f"line {error.lineno}: {(error.text or '').strip()}"
    else:
        where = f"line {frames[-1].lineno}: {frames[-1].line}" if frames else ""
    memory = isinstance(error, MemoryError) or any(words in text for words in NO_MEMORY)
    return {"kind": "MemoryError" if memory else type(error).__name__, "text": text[:300], "where": where[:200]}


if __name__ == "__main__":
    main(sys.argv[1:])
