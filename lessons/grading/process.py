"""A student's file as a function to call, in a process of its own, stopped when it takes too long or too much memory.

The limits protect a classroom from mistakes. They are no wall against an attack: the process has the rights of the
user who runs it, so hostile files belong into a container.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .wire import MAX_BYTES, decode, encode

ROOT = Path(__file__).resolve().parents[2]
WALL = 6  # by the clock, a call may take so many times the processor seconds: the machine does other things too
START_SECONDS = 120
MAX_PRINTED_LINES = 50
MAX_LINE = 300


@dataclass
class StudentError(Exception):
    """What went wrong in the student's file, in words for the student."""

    text: str
    ends: bool = False
    """no further call can be made"""
    unwritten: bool = False
    """the exercise still raises NotImplementedError"""


class StudentProcess:
    """student("function", *arguments) → the value it returns; raises StudentError. Use it in a `with`."""

    def __init__(self, file: Path, *, seconds: int = 20, megabytes: int = 1024, wall: int | None = None) -> None:
        """seconds: of the processor, for all calls; megabytes: beyond what torch holds; wall: seconds for one call."""
        self.file, self.seconds, self.megabytes = file.resolve(), seconds, megabytes
        self.wall = WALL * seconds if wall is None else wall
        self.printed: list[str] = []
        self.dropped = 0

    def __enter__(self) -> "StudentProcess":
        calls, self._calls = os.pipe()
        self._answers, answers = os.pipe()
        command = [sys.executable, "-m", "lessons.grading.student", str(self.file), str(calls), str(answers)]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        settings = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
        device = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [*command, str(self.seconds), str(self.megabytes)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | settings | device,
            pass_fds=(calls, answers),
            start_new_session=True,
        )
        os.close(calls)
        os.close(answers)
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._read_prints, args=[self._process.stdout], daemon=True)
        self._reader.start()
        try:
            self._receive(START_SECONDS)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        for fd in (self._calls, self._answers):
            os.close(fd)
        self._reader.join(timeout=5)

    def __call__(self, function: str, *arguments: Any) -> Any:
        try:
            _write(self._calls, encode({"function": function, "arguments": list(arguments)}))
        except BrokenPipeError:
            raise self._ended() from None
        return self._receive(self.wall)["value"]

    def _receive(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        size = int.from_bytes(self._read(8, deadline), "big")
        if not 0 < size <= MAX_BYTES:
            raise self._stopped("the file wrote into the grader's channel")
        try:
            answer = decode(self._read(size, deadline))
            error = answer.get("error")
        except (ValueError, AttributeError):
            raise self._stopped("the file wrote into the grader's channel") from None
        if error is not None:
            raise self._in_words(error)
        return answer

    def _read(self, n: int, deadline: float) -> bytes:
        parts, missing = [], n
        while missing:
            left = deadline - time.monotonic()
            if not select.select([self._answers], [], [], max(0.0, left))[0]:
                raise self._stopped(f"stopped: no answer after {self.wall} s. Does it wait for something?")
            part = os.read(self._answers, min(missing, 1 << 20))
            if not part:
                raise self._ended()
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def _in_words(self, error: dict[str, str]) -> StudentError:
        kind, text, where = (str(error.get(key, "")) for key in ("kind", "text", "where"))
        if kind == "NotImplementedError":
            return StudentError(f"not written yet: {text}", ends=True, unwritten=True)
        if kind == "MemoryError":
            return StudentError(f"needs more memory than the limit of {self.megabytes} MB ({where})", ends=True)
        return StudentError(f"{kind}: {text}" + (f" ({where})" if where else ""))

    def _ended(self) -> StudentError:
        """Why the process is gone."""
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return self._stopped("the file closed the grader's channel")
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            return StudentError(
                f"stopped after {self.seconds} s of computing: is there a loop without an end?", ends=True
            )
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return StudentError(f"the file ended its process ({how})", ends=True)

    def _stopped(self, why: str) -> StudentError:
        self._kill()
        return StudentError(why, ends=True)

    def _kill(self) -> None:
        """The process, and whatever it started."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _read_prints(self, stream: BinaryIO) -> None:
        for line in iter(lambda: stream.readline(MAX_LINE), b""):
            if len(self.printed) < MAX_PRINTED_LINES:
                self.printed.append(line.decode(errors="replace").rstrip("\n"))
            else:
                self.dropped += 1
        stream.close()


def _write(fd: int, message: bytes) -> None:
    view = memoryview(message)
    while view:
        view = view[os.write(fd, view) :]
