"""A process of `qlora bench gpu`: it makes cases and times arms as it is asked to, a JSON line in, a JSON line out.

bitsandbytes 0.49 and 0.50 cannot be imported side by side, so each has a process of its own, and ours one without
either. All of them live as long as the benchmark does, and the parent lets one arm run at a time.

    {"case": {…}, "arm": "ours"}    makes the arm, checks it, warms it up    {"status": "ok", "choice": …, "version": …}
    {"time": 20, "arm": "ours"}     times it 20 times                        {"status": "ok", "milliseconds": […]}
    {"forget": true}                frees all arms                           {"status": "ok"}

A status other than ok says why there are no times: "out of memory", or "wrong: " and what the check found.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_arms import BNB, Arm, Case, arm_of

FLUSHED_BYTES = 256 << 20  # more than any L2 cache
WARM_UP = 3
Timer = Callable[[Callable[[], Any], int], list[float]]


def cuda_milliseconds(run: Callable[[], Any], times: int) -> list[float]:
    """By CUDA events around each call, with the L2 cache overwritten before it."""
    flush = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    for start, end in marks:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in marks]


def cpu_milliseconds(run: Callable[[], Any], times: int) -> list[float]:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        taken.append(1e3 * (time.perf_counter() - start))
    return taken


class Worker:
    """Answers one request after the other; holds the arms of one case."""

    def __init__(self, device: torch.device, timer: Timer) -> None:
        self.device, self.timer = device, timer
        self.arms: dict[str, Arm] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        name = request.get("arm", "")
        try:
            if "case" in request:
                return self.make(name, Case(**request["case"]))
            if "time" in request:
                return {"status": "ok", "milliseconds": self.timer(self.arms[name].run, request["time"])}
            self.arms.clear()
            self.free()
            return {"status": "ok"}
        except torch.OutOfMemoryError:
            self.arms.pop(name, None)
            self.free()
            return {"status": "out of memory"}

    def make(self, name: str, case: Case) -> dict[str, Any]:
        arm = arm_of(name, case, self.device)
        try:
            arm.check()
        except ValueError as error:
            return {"status": f"wrong: {error}"}
        for _ in range(WARM_UP):
            arm.run()
        self.free()
        self.arms[name] = arm
        return {"status": "ok", "choice": arm.choice(), "version": version_of(name)}

    def free(self) -> None:
        """What the check used must be there for the next arm, in whichever process."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def version_of(name: str) -> str:
    if name != BNB:
        return ""
    import bitsandbytes

    return bitsandbytes.__version__


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--device", default="cuda")
    device = torch.device(flags.parse_args().device)
    worker = Worker(device, cuda_milliseconds if device.type == "cuda" else cpu_milliseconds)
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints must not come between the answers
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
