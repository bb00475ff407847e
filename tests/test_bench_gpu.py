"""`qlora bench gpu`, as far as a CPU can tell: checks, turns, rows, files and plots; and what it says without a GPU.

The operations run on CPU tensors, and times are made up: only the GPU's events and its memory are not tested here.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import qlora
from benchmarks import bench_gpu, gpu_arms, results
from benchmarks.gpu_arms import ARMS, BNB, COMPOSED, DENSE, OURS, Case, arm_of
from benchmarks.gpu_worker import Worker, cpu_milliseconds

CPU = torch.device("cpu")
CASE = Case("forward", "tiny", "q", 96, 64, 3, True, "fp32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so_in_one_line(capfd):
    with pytest.raises(SystemExit) as ended:
        qlora.main(["bench", "gpu"])
    assert ended.value.code == 2
    said = capfd.readouterr()
    assert said.out + said.err == "bench gpu: no GPU here, or torch was built without CUDA: nothing is measured\n"


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("op", "arm"), [(op, arm) for op, arms in ARMS.items() for arm in arms])
def test_every_arm_computes_what_it_should(op, arm, double_quant):
    if arm == BNB:
        pytest.importorskip("bitsandbytes")
    for M in (1, 70):  # more rows than are checked
        made = arm_of(arm, replace(CASE, op=op, M=M, double_quant=double_quant), CPU)
        made.check()
        assert made.run() is not None


@pytest.mark.parametrize("op", ["forward", "dx", "lora", "cross-entropy", "quantize", "dequantize"])
def test_a_wrong_kernel_gets_no_times(op, monkeypatch):
    def wrong(call):
        return lambda *arguments, **options: call(*arguments, **options) * 1.01

    real = gpu_arms.implementation
    monkeypatch.setattr(gpu_arms, "implementation", lambda *name: wrong(real(*name)))
    for name in ("lora_matmul", "linear_cross_entropy"):
        monkeypatch.setattr(gpu_arms.kernels, name, wrong(getattr(gpu_arms.kernels, name)))
    if op == "dequantize":
        monkeypatch.setattr(gpu_arms.kernels, op, wrong(gpu_arms.kernels.dequantize))
    if op == "quantize":
        quantize = gpu_arms.kernels.quantize
        monkeypatch.setattr(gpu_arms.kernels, op, lambda w, **options: quantize(w * 1.01, **options))
    answer = Worker(CPU, cpu_milliseconds).answer({"case": asdict(replace(CASE, op=op)), "arm": OURS})
    assert answer["status"].startswith("wrong: ")


class Fake:
    """A worker whose arms take made-up times, or have no memory for some."""

    def __init__(self, log: list[tuple[Any, ...]], name: str) -> None:
        self.log, self.name = log, name

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        arm = request.get("arm", "")
        self.log.append((self.name, arm, request.get("time"), "case" in request))
        if arm == COMPOSED and "case" in request:
            return {"status": "wrong: y"}
        if self.name == "2" and request.get("time", 0) > 5:
            return {"status": "out of memory"}
        each = {DENSE: 4.0, OURS: 1.0, BNB: 100.0}.get(arm, 0.0)
        return {"status": "ok", "choice": arm, "version": self.name, "milliseconds": [each] * request.get("time", 0)}


def test_arms_take_turns_and_a_row_says_what_became_of_each():
    log: list[tuple[Any, ...]] = []
    rows = bench_gpu.measure(CASE, {name: Fake(log, name) for name in ("", "1", "2")}, rounds=2)
    assert [(row["arm"], row["status"], row["p50_ms"], row["ratio"], row["calls"]) for row in rows] == [
        (DENSE, "ok", "4.0000", "1.0000", 20),
        (COMPOSED, "wrong: y", "", "", ""),
        (OURS, "ok", "1.0000", "0.2500", 80),
        ("bitsandbytes 1", "ok", "100.0000", "25.0000", 10),
        ("bitsandbytes 2", "ok", "100.0000", "25.0000", 10),
    ]
    timed = [(name, arm, times) for name, arm, times, _ in log if times]
    turn = [("", DENSE, 10), ("", OURS, 40), ("1", BNB, 5), ("2", BNB, 5)]
    assert timed == [(name, arm, 5) for name, arm, _ in turn] + turn * 2
    assert log[-3:] == [(name, "", None, False) for name in ("", "1", "2")]


def test_what_does_not_fit_says_so():
    def full(run, times):
        raise torch.OutOfMemoryError

    worker = Worker(CPU, full)
    assert worker.answer({"case": asdict(CASE), "arm": OURS})["status"] == "ok"
    assert worker.answer({"time": 5, "arm": OURS}) == {"status": "out of memory"}
    assert worker.arms == {}


def test_cases_are_every_layer_row_count_and_kind_of_scales():
    cases = list(bench_gpu.cases_of("llama-3-8b", "bf16", [1, 64], list(ARMS)))
    assert len(set(cases)) == len(cases) == 6 * 2 * (2 + 3 * 2) + 2
    assert {(case.N, case.K) for case in cases if case.op == "dx"} >= {(1024, 4096), (28672, 4096), (4096, 14336)}
    assert [case.N for case in bench_gpu.cases_of("smollm2-135m", "fp16", [4], ["cross-entropy"])] == [49152]


class InProcess(Worker):
    def __init__(self, bitsandbytes: Path | None) -> None:
        super().__init__(CPU, cpu_milliseconds)

    ask = Worker.answer

    def close(self) -> None:
        self.arms.clear()


def test_the_whole_of_it_with_a_gpu_that_is_pretended(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(bench_gpu, "Process", InProcess)
    monkeypatch.setattr(bench_gpu, "MILLISECONDS_A_TURN", 0.0)
    monkeypatch.setattr(bench_gpu, "MODELS", {"tiny": {"q": (96, 64)}})
    monkeypatch.setattr(bench_gpu, "HEADS", {"tiny": (96, 64)})
    monkeypatch.setattr(bench_gpu.subprocess, "run", pretended)
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    for module in (bench_gpu, results):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench_gpu", "--rows", "1", "5", "--rounds", "1"])
    assert bench_gpu.main() == 0
    assert "bitsandbytes 0.49.2 is left out: no network" in capsys.readouterr().err
    rows = results.read_rows(tmp_path / "gpu.csv")
    assert len(rows) == 2 * (1 + 2 + 2 * 3 * 3) + 2 * 3  # no bitsandbytes
    assert {row["status"] for row in rows} == {"ok"}
    assert {(row["gpu"], row["driver"], row["sm_clock_mhz"]) for row in rows} == {("Tesla T4", "550.54", "1590")}
    assert all(float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"]) for row in rows)
    plots = {f"gpu-Tesla-T4-tiny-{op}.png" for op in ("forward", "dx", "lora", "cross-entropy")}
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.csv", *plots}


def pretended(command: list[str], **options: Any) -> Any:
    """nvidia-smi answers, pip has no network."""
    from types import SimpleNamespace

    if command[0] == "nvidia-smi":
        facts = {"driver_version": "550.54", "power.limit": "70.00", "clocks.max.sm": "1590", "clocks.sm": "1590"}
        asked = command[2].removeprefix("--query-gpu=").split(",")
        return SimpleNamespace(stdout=", ".join(facts[fact] for fact in asked) + "\n")
    return SimpleNamespace(returncode=1, stdout="", stderr="…\nno network\n")


def test_a_peer_is_installed_once_and_comes_first_on_the_path(tmp_path, monkeypatch):
    calls = []

    def pip(command: list[str], **options: Any) -> Any:
        calls.append(command)
        Path(command[command.index("--target") + 1]).mkdir(parents=True)
        return type("Done", (), {"returncode": 0})

    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(bench_gpu.subprocess, "run", pip)
    folders = [bench_gpu.install("0.49.2") for _ in range(2)]
    assert folders == [tmp_path / "bitsandbytes-0.49.2"] * 2
    assert [command[-1] for command in calls] == ["bitsandbytes==0.49.2"]
    assert bench_gpu.Process(folders[0]).paths[0] == str(folders[0])


def test_a_process_answers_and_one_that_dies_is_a_status_and_starts_again(monkeypatch):
    process = bench_gpu.Process(None, "cpu")
    small = {"case": asdict(replace(CASE, op="dequantize", M=0)), "arm": OURS}
    try:
        assert process.ask(small)["status"] == "ok"
        assert len(process.ask({"time": 4, "arm": OURS})["milliseconds"]) == 4
        process.process.kill()
        assert process.ask({"time": 4, "arm": OURS}) == {"status": "its process ended with exit code -9"}
        assert process.ask({"forget": True}) == {"status": "ok"}
    finally:
        process.close()
    assert process.process is None
