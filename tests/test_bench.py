"""qlora bench and benchmarks/common.py: names, flags passed on, and the arithmetic of a row."""

import pytest

import qlora
from benchmarks.common import check_accuracy, rows_of, shapes_of, take_turns
from commands import bench
from tests.accuracy import exact


def test_backends_are_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert qlora.main(["bench", "backends"]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()] == ["reference", "triton", "cpu", "auto"]


def test_an_unknown_benchmark_is_refused_with_the_names_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert qlora.main(["bench", "nothing"]) == 2
    assert "no benchmark 'nothing': there are backends, autotune, compile, " in capsys.readouterr().err


def test_flags_are_passed_on_and_a_failure_is_told(tmp_path, monkeypatch, capfd) -> None:
    (tmp_path / "bench_probe.py").write_text("import sys; print(sys.argv[1:]); sys.exit(len(sys.argv) - 3)")
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    assert qlora.main(["bench", "probe", "--", "--rounds", "3"]) == 0
    assert "['--rounds', '3']" in capfd.readouterr().out
    assert qlora.main(["bench", "probe", "--", "--rounds", "3", "x"]) == 2
    assert "benchmark probe ended with exit code 1" in capfd.readouterr().err


def test_turns_alternate_and_warm_up_is_not_counted() -> None:
    order: list[str] = []
    times = take_turns({name: lambda name=name: order.append(name) for name in "ab"}, rounds=3)
    assert order == ["a", "b"] * 5
    assert {name: len(taken) for name, taken in times.items()} == {"a": 3, "b": 3}


def test_a_row_holds_percentiles_and_the_median_of_the_ratios() -> None:
    pytest.importorskip("bitsandbytes")
    rows = rows_of({"M": 1}, {"base": [1.0, 2.0, 10.0], "ours": [3.0, 1.0, 5.0]}, "base")
    ours = rows[1]
    assert (ours["key"], ours["ratio"], ours["p50_ms"]) == ("1/ours", "0.5000", "3.000")
    assert (ours["p20_ms"], ours["p80_ms"]) == ("1.800", "4.200")


def test_shapes_and_the_gate() -> None:
    assert shapes_of("4096x64,8x32") == [(4096, 64), (8, 32)]
    value = exact([[1.0]])
    check_accuracy(value + 2e-7, value - 1.1e-7, value, "y")
    with pytest.raises(ValueError, match=r"y: error 3e-07, plain torch's is 1e-07"):
        check_accuracy(value + 3e-7, value + 1e-7, value, "y")
