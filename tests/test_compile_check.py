"""kernels/compile_check.py: what the kernels become on an A100 and an H100, and that a failed compilation is a row.

Two targets and a few tiles, to stay short; `qlora bench compile` does all of them. A budget: instructions of the main
loop for each weight looked up, masks and both levels of scales included.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Linux only")
import kernels.compile_cases as compile_cases
import kernels.compile_check as compile_check
from kernels.compile_check import Row, check
from kernels.sass import main_loop, parse, pipes
from kernels.triton.configs import SHARED_MEMORY

SHIPPED = "dequantize words|dequantize gather bf16|decode|^(forward|backward)( lora)? 64x128"
BUDGET = {
    80: {
        "dequantize words": 7.5,
        "dequantize gather": 15.0,
        "forward": 8.6,
        "backward": 11.5,
        "decode": 8.0,
        "backward decode": 8.0,
    }
}
BUDGET[90] = BUDGET[80] | {"forward": 6.9, "backward": 8.2}
LORA_MAY_ADD = 0.15


@pytest.fixture(scope="module", params=[80, 90], ids=["sm_80", "sm_90"])
def compiled(request: pytest.FixtureRequest) -> tuple[int, list[Row]]:
    return request.param, check(request.param, SHIPPED)


def test_every_kernel_compiles_without_spills_and_fits(compiled: tuple[int, list[Row]]) -> None:
    target, rows = compiled
    assert len(rows) == 8
    for row in rows:
        assert row.status == "ok", row
        assert (row.spills, row.stack) == (0, 0), row
        assert 0 < row.registers <= 255
        assert row.shared <= 1024 * SHARED_MEMORY[target], row


def test_products_use_tensor_cores(compiled: tuple[int, list[Row]]) -> None:
    for row in compiled[1]:
        assert (row.tensor > 0) == (not row.kernel.startswith("dequantize")), row


def test_instructions_per_weight_stay_within_budget(compiled: tuple[int, list[Row]]) -> None:
    target, rows = compiled
    for row in rows:
        budget = BUDGET[target][row.kernel.removesuffix(" lora")]
        allowed = budget + (LORA_MAY_ADD if row.kernel.endswith("lora") else 0)
        assert row.per_weight is not None
        assert 4 < row.per_weight <= allowed, row


def test_lora_costs_the_main_loop_next_to_nothing(compiled: tuple[int, list[Row]]) -> None:
    per_weight = {row.kernel: row.per_weight for row in compiled[1]}
    for name in ("forward", "backward"):
        assert per_weight[f"{name} lora"] - per_weight[name] <= LORA_MAY_ADD


def test_amd_takes_the_gather_path_and_matrix_cores() -> None:
    rows = check(942, "^forward 64x64")
    assert [(row.target, row.status, row.spills) for row in rows] == [("gfx942", "ok", 0)]
    assert rows[0].tensor > 0
    assert rows[0].shared <= 1024 * SHARED_MEMORY[942]


def test_the_cases_hold_every_tile_that_autotune_may_choose() -> None:
    from kernels.triton import configs

    for target in (80, 86, 89, 90, 100, 120):
        names = {(case.name, str(case.config)) for case in compile_cases.cases(target)}
        family = configs.family(target)
        for table, name in ((configs.FORWARD, "forward"), (configs.BACKWARD, "backward")):
            for config in table[family]:
                assert {(name, str(config)), (f"{name} lora", str(config))} <= names


def test_a_t4_has_no_product_kernels_and_every_target_a_dequantize() -> None:
    for target in compile_check.TARGETS:
        names = {case.name for case in compile_cases.cases(target)}
        assert "dequantize gather" in names
        assert ("forward" in names) == (target != 75)


def test_a_crashed_compiler_is_a_row_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that dies at its second case, as LLVM does at an asm text for the wrong machine."""
    calls: list[list[str]] = []
    real = compile_check.subprocess.run

    def dies_once(command: list[str], **options: object):
        calls.append(command)
        code = (
            "import json; r = dict(target='sm_80', kernel='k', config='c', status='ok')\n"
            "print('ROW ' + json.dumps(r))\n"
        )
        ending = "import os, sys; print('LLVM ERROR', file=sys.stderr); os.abort()" if len(calls) == 1 else ""
        return real([command[0], "-c", code + ending], **options)

    monkeypatch.setattr(compile_check.subprocess, "run", dies_once)
    rows = check(80, "^reduce|^quantize|^decode")
    assert [row.status for row in rows] == ["ok", "the compiler ended: LLVM ERROR", "ok"]
    assert [command[-1] for command in calls] == ["0", "2"]


def test_an_error_of_the_compiler_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*arguments: object, **options: object) -> None:
        raise RuntimeError("in the kernel:\nno such instruction")

    monkeypatch.setattr(compile_cases.Case, "_source", lambda self: None)
    monkeypatch.setattr(compile_cases.triton, "compile", refuses)
    row = next(compile_cases.cases(80, "^reduce")).compile(80)
    assert (row.kernel, row.status) == ("reduce", "not compiled: no such instruction")


def test_the_table_and_the_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        compile_check.main(["--targets", "80", "--only", "^reduce", "--no-peer", "--csv", str(tmp_path / "a.csv")]) == 0
    )
    printed = capsys.readouterr().out
    assert "not speeds" in printed
    assert "sm_80" in printed
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["target"], row["kernel"], row["status"]) for row in rows] == [("sm_80", "reduce", "ok")]
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.U8 R2, [R4] ;
        /*0020*/                   PRMT R3, R2, 0x4051, R5 ;
.L_x_2:
        /*0030*/                   PRMT R3, R2, 0x4051, R5 ;
        /*0040*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;
        /*0050*/                   NOP ;
        /*0060*/              @!P0 BRA `(.L_x_2) ;
        /*0070*/               @P1 BRA 0x10 ;
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   BRA `(.L_x_3) ;
"""


def test_the_main_loop_is_the_innermost_that_looks_up() -> None:
    everything, *loops = parse(LISTING)
    assert len(everything) == 10
    assert [len(loop) for loop in loops] == [7, 4]
    loop = main_loop(LISTING, "PRMT")
    assert [i.base for i in loop] == ["PRMT", "HMMA", "BRA"]
    assert pipes(loop) == {"alu": 1, "tensor": 1, "control": 1}
    assert [i.base for i in main_loop(LISTING, "FFMA")][:2] == ["MOV", "LDG"], "no loop holds it: everything"
