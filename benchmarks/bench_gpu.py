"""`make gpu-bench`: our kernels on the GPU that is here, beside bitsandbytes 0.49 and 0.50, dequantize + torch.matmul,
and dense torch.

    qlora bench gpu -- --models smollm2-135m --rows 1 64 1024

gpu_arms.py says what is timed and how each arm is checked first; an arm that fails its check gets no time. Each arm of
a case is timed in `--rounds` turns, in the process that holds it, by CUDA events, the L2 cache overwritten before each
call. The two versions of bitsandbytes are installed once, each into a folder of its own in the cache (QLORA_CACHE).

Rows go to results/gpu.csv as each model is done: percentiles in milliseconds, the ratio to the case's first arm, the
clock of the multiprocessors right after, the driver; plots beside it. What does not fit the GPU's memory says so.
Activations are bf16, or fp16 before sm_80: a T4, which also has no fused products, so ours dequantizes and calls torch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import track

from benchmarks.gpu_arms import ARMS, BNB, Case
from benchmarks.gpu_plots import plot
from benchmarks.results import RESULTS, write_rows
from benchmarks.shapes import MODELS, ROWS
from kernels.cpu.build import cache_folder

PEERS = ("0.49.2", "0.50.2")
HEADS = {"smollm2-135m": (49152, 576), "llama-3-8b": (128256, 4096), "llama-3-70b": (128256, 8192)}
ROOT = Path(__file__).resolve().parent.parent
MILLISECONDS_A_TURN, FIRST_TURN = 40.0, 5


class Asked(Protocol):
    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """gpu_worker.py says what may be asked."""


class Process:
    """gpu_worker.py in a process of its own, started again when it died."""

    def __init__(self, bitsandbytes: Path | None, device: str = "cuda") -> None:
        self.paths = [str(path) for path in (bitsandbytes, ROOT) if path]
        self.device = device
        self.process: subprocess.Popen[str] | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.process is None:
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(self.paths)}
            command = [sys.executable, "-m", "benchmarks.gpu_worker", "--device", self.device]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.process = subprocess.Popen(command, text=True, cwd=ROOT, env=environment, **pipes)  # type: ignore[call-overload]
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        return {"status": f"its process ended with exit code {self.close()}"}

    def close(self) -> int:
        """End the process, if there is one: its exit code."""
        ended, self.process = self.process, None
        if ended is None:
            return 0
        ended.communicate()
        return ended.returncode


def install(wanted: str) -> Path:
    """The folder of this bitsandbytes, installed there at first use. Raises OSError when it cannot be."""
    folder = cache_folder() / f"bitsandbytes-{wanted}"
    if not folder.exists():
        aside = folder.with_name(folder.name + ".tmp")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(aside)]
        done = subprocess.run([*command, f"bitsandbytes=={wanted}"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError((done.stderr.strip().splitlines() or ["pip failed"])[-1])
        os.replace(aside, folder)
    return folder


def cases_of(model: str, dtype: str, rows: Sequence[int], ops: Sequence[str]) -> Iterator[Case]:
    """Every case of a model, with and without double quantization."""
    for layer, (N, K) in MODELS[model].items():
        for double_quant in (True, False):
            for op in ("quantize", "dequantize", "forward", "dx", "lora"):
                if op in ops:
                    for M in rows if op in ("forward", "dx", "lora") else (0,):
                        yield Case(op, model, layer, N, K, M, double_quant, dtype)
    if "cross-entropy" in ops:
        for M in rows:
            yield Case("cross-entropy", model, "head", *HEADS[model], M, True, dtype)


def measure(case: Case, workers: dict[str, Asked], rounds: int) -> list[dict[str, Any]]:
    """A row for each arm of the case. workers: "" has all arms but bitsandbytes'; the others are named by version."""
    arms = {
        f"{arm} {version}".strip(): (arm, workers[version])
        for arm in ARMS[case.op]
        for version in workers
        if (arm == BNB) == bool(version)
    }
    made = {name: worker.ask({"case": asdict(case), "arm": arm}) for name, (arm, worker) in arms.items()}
    times: dict[str, list[list[float]]] = {name: [] for name in arms}
    turns = dict.fromkeys(arms, FIRST_TURN)
    for turn in range(rounds + 1):  # the first round only tells how long a turn should be
        for name, (arm, worker) in arms.items():
            if made[name]["status"] != "ok":
                continue
            answer = worker.ask({"time": turns[name], "arm": arm})
            if answer["status"] != "ok":
                made[name] = answer
            elif turn == 0:
                each = statistics.median(answer["milliseconds"])
                turns[name] = max(FIRST_TURN, min(50, int(MILLISECONDS_A_TURN / max(each, 1e-3))))
            else:
                times[name].append(answer["milliseconds"])
    for worker in workers.values():
        worker.ask({"forget": True})
    return rows_of(case, made, times)


def rows_of(case: Case, made: dict[str, dict[str, Any]], times: dict[str, list[list[float]]]) -> list[dict[str, Any]]:
    """Percentiles over all calls; the ratio is the median over the turns of the medians' ratio to the first arm's."""
    base = next(iter(made))
    medians = {name: [statistics.median(turn) for turn in turns] for name, turns in times.items()}
    rows = []
    for name, answer in made.items():
        measured: dict[str, Any] = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "calls", "base", "ratio"), "")
        if answer["status"] == "ok":
            calls = sorted(call for turn in times[name] for call in turn)
            fifths = statistics.quantiles(calls, n=5, method="inclusive")
            percentiles = {"p20_ms": fifths[0], "p50_ms": statistics.median(calls), "p80_ms": fifths[-1]}
            measured |= {key: f"{value:.4f}" for key, value in percentiles.items()} | {
                "calls": len(calls),
                "base": base,
            }
            if made[base]["status"] == "ok":
                ratios = (a / b for a, b in zip(medians[name], medians[base], strict=True))
                measured["ratio"] = f"{statistics.median(ratios):.4f}"
        status = {"status": answer["status"], "choice": answer.get("choice", ""), "version": answer.get("version", "")}
        rows.append({"arm": name} | asdict(case) | status | measured)
    return rows


def gpu_state(*facts: str) -> list[str]:
    """What nvidia-smi says of the first GPU, empty where it is not there."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(facts)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return [""] * len(facts)
    return [fact.strip() for fact in done.stdout.strip().split(",")]


def run(cases: Sequence[Case], workers: dict[str, Asked], gpu: dict[str, str], rounds: int) -> list[dict[str, Any]]:
    """All rows, with the GPU's facts and its clock after each case."""
    rows = []
    for case in track(cases, description=cases[0].model):
        found = measure(case, workers, rounds)
        (clock,) = gpu_state("clocks.sm")
        for row in found:
            name = "/".join(map(str, [gpu["gpu"], *asdict(case).values(), row["arm"]]))
            rows.append({"key": name} | row | gpu | {"sm_clock_mhz": clock})
    return rows


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    flags.add_argument("--ops", nargs="+", choices=ARMS, default=list(ARMS))
    flags.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="M: rows of activations")
    flags.add_argument("--dtype", choices=("fp16", "bf16"), help="default: bf16, or fp16 before sm_80")
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--peers", nargs="*", default=list(PEERS), help="versions of bitsandbytes")
    args = flags.parse_args()
    if not torch.cuda.is_available():
        print("bench gpu: no GPU here, or torch was built without CUDA: nothing is measured", file=sys.stderr)
        return 2
    dtype = args.dtype or ("bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16")
    driver, power, clock = gpu_state("driver_version", "power.limit", "clocks.max.sm")
    gpu = {"gpu": torch.cuda.get_device_name(), "driver": driver, "power_limit_w": power, "max_sm_clock_mhz": clock}
    gpu |= {"cuda": torch.version.cuda or "", "triton": version("triton")}
    workers: dict[str, Process] = {"": Process(None)}
    for peer in args.peers:
        try:
            workers[peer] = Process(install(peer))
        except OSError as error:
            print(f"bitsandbytes {peer} is left out: {error}", file=sys.stderr)
    wrong = 0
    for model in args.models:
        rows = run(list(cases_of(model, dtype, args.rows, args.ops)), dict(workers), gpu, args.rounds)
        write_rows("gpu", rows, key="key")
        plot(rows, RESULTS)
        wrong += sum(row["status"].startswith("wrong") for row in rows)
    for worker in workers.values():
        worker.close()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
