"""kernels/triton/autotune.py: the fastest candidate is chosen by measurement, kept, listed, saved and read again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import quant

triton = pytest.importorskip("triton", reason="Linux only")
from kernels.triton import autotune  # noqa: E402
from kernels.triton.configs import Config  # noqa: E402

SMALL, TALL = Config(16, 128), Config(64, 128)


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a new process, with a cache of its own."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    autotune.read_kept.cache_clear()
    monkeypatch.setattr(autotune, "_choices", {})
    monkeypatch.setattr(autotune, "_timings", {})


def refuses() -> torch.Tensor:
    raise triton.runtime.errors.OutOfResources(2, 1, "shared memory")


def test_the_fastest_wins_and_what_does_not_compile_is_left_out() -> None:
    made = {name: torch.zeros(1) for name in ("a", "b")}
    runs = {"a": lambda: made["a"], "b": lambda: made["b"], "too big": refuses}

    def timer(call) -> float:
        return {id(made["a"]): 2.0, id(made["b"]): 0.5}[id(call())]

    assert autotune.choose("key", runs, timer) == "b"
    assert autotune.table() == ["key: b (a 2.0000, b 0.5000)"]


@pytest.mark.parametrize("composed_is_faster", [True, False])
def test_run_times_once_and_then_keeps_to_its_choice(composed_is_faster: bool, monkeypatch) -> None:
    monkeypatch.setattr(autotune, "_may_time", lambda rows: True)
    timed: list[str] = []

    def fused(config: Config) -> torch.Tensor:
        return torch.full((1,), float(config.BM))

    def composed() -> torch.Tensor:
        return torch.full((1,), -1.0)

    def milliseconds(call) -> float:
        value = call().item()
        timed.append(str(value))
        return {16.0: 3.0, 64.0: 1.0, -1.0: 0.5 if composed_is_faster else 2.0}[value]

    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    q, rows = quant.quantize(torch.randn(6, 64)), torch.randn(33, 64)
    for _ in range(2):
        result = autotune.run("forward", rows, q, [SMALL, TALL], fused, composed)
        assert result.item() == (-1.0 if composed_is_faster else 64.0)
    assert timed == ["16.0", "64.0", "-1.0"]
    key = "cpu | forward | M 64 | 6x64 | float32 | 64 | 2"
    chosen = autotune.COMPOSED if composed_is_faster else str(TALL)
    assert autotune.table()[0].startswith(f"{key}: {chosen} (")


def test_without_timing_the_lowest_tile_that_holds_all_rows() -> None:
    assert autotune.default([SMALL, TALL], 1) == SMALL
    assert autotune.default([SMALL, TALL], 17) == TALL
    assert autotune.default([SMALL, TALL], 5000) == TALL


def test_choices_are_saved_and_read_again(tmp_path: Path) -> None:
    autotune.choose("key", {"a": lambda: torch.zeros(1)}, lambda call: 1.0)
    before = autotune.table()
    autotune.save(tmp_path / "choices.json")
    autotune._choices.clear()
    autotune._timings.clear()
    autotune.load(tmp_path / "choices.json")
    assert autotune.table() == before
    assert [path.name for path in tmp_path.iterdir()] == ["choices.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"choices": {}}', '{"choices": 3, "timings": {}}'])
def test_a_file_that_is_no_table_of_choices_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "choices.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"choices.json is not a file of autotune choices"):
        autotune.load(path)


def forget() -> None:
    """What a new process does not know."""
    autotune._choices.clear()
    autotune._timings.clear()
    autotune.read_kept.cache_clear()


def run_once(timed: list[str], monkeypatch: pytest.MonkeyPatch, rows: int = 33) -> float:
    """The product of `rows` rows by fused tiles or composed (-1), which is the fastest above 64 rows."""
    monkeypatch.setattr(autotune, "_may_time", lambda rows: True)

    def milliseconds(call) -> float:
        value = call().item()
        timed.append(str(value))
        return 0.5 if (value == -1.0) == (rows > 64) else 2.0 + value

    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    q, x = quant.quantize(torch.randn(6, 64)), torch.randn(rows, 64)

    def fused(config: Config) -> torch.Tensor:
        return torch.full((1,), float(config.BM))

    return autotune.run("forward", x, q, [SMALL, TALL], fused, lambda: torch.full((1,), -1.0)).item()


def test_a_new_process_reads_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    first = run_once(timed, monkeypatch)
    before = autotune.table()
    assert len(timed) == 3
    forget()
    assert run_once(timed, monkeypatch) == first
    assert len(timed) == 3
    assert autotune.table() == before
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.name == f"autotune-triton-{triton.__version__}-{autotune.source_hash()[:16]}.json"


def test_other_code_measures_again_and_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    run_once(timed, monkeypatch)
    forget()
    monkeypatch.setattr(autotune, "source_hash", lambda: "0" * 64)
    run_once(timed, monkeypatch)
    assert len(timed) == 6
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_two_processes_keep_both_their_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    autotune.choose("of another process", {"a": lambda: torch.zeros(1)}, lambda call: 1.0)
    autotune.keep(autotune.kept_in())
    forget()
    autotune.read_kept(Path("read before the other wrote"))
    autotune.choose("mine", {"b": lambda: torch.zeros(1)}, lambda call: 1.0)
    autotune.keep(autotune.kept_in())
    forget()
    autotune.read_kept(autotune.kept_in())
    assert set(autotune._choices) == {"of another process", "mine"}


@pytest.mark.parametrize("how", ["broken", "a folder"])
def test_a_file_that_cannot_be_used_costs_a_notice(how: str, monkeypatch, caplog) -> None:
    monkeypatch.setattr("kernels.dispatch._said", set())
    path = autotune.kept_in()
    path.parent.mkdir()
    if how == "broken":
        path.write_text("{")
    else:
        path.mkdir()
    timed: list[str] = []
    run_once(timed, monkeypatch)
    assert len(timed) == 3
    assert "autotune measures again" in caplog.text
    assert ("could not keep" in caplog.text) == (how == "a folder")


def test_where_it_changes_over_is_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import bench_autotune

    monkeypatch.setattr("sys.argv", ["bench_autotune", "--all"])
    assert bench_autotune.main() == 0
    assert "nothing was measured" in capsys.readouterr().out
    for rows in (1, 33, 65, 1000):
        run_once([], monkeypatch, rows)
    assert [list(row.values()) for row in autotune.crossovers()] == [
        ["cpu", "forward", "6x64", "float32", "64", "2", "1, 64, 128, 1024", "64", "128, 1024"]
    ]
    monkeypatch.setenv("COLUMNS", "200")
    assert bench_autotune.main() == 0
    printed = capsys.readouterr().out
    assert "128, 1024" in printed
    assert "M 1024 | 6x64 | float32 | 64 | 2: dequantize + torch.matmul (" in printed
