"""kernels/cpu/build.py and the fallback: where the library goes, what a bad compiler says, and that nothing fails."""

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
import quant
from kernels import dispatch, use_backend
from kernels.cpu import build, library, operations

ROOT = Path(__file__).parents[1]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder, nothing loaded yet and nothing said yet."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("QLORA_BACKEND", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(dispatch, "_said", set())
    library.why_missing.cache_clear()
    library._load.cache_clear()
    yield tmp_path
    library.why_missing.cache_clear()
    library._load.cache_clear()


def a_compiler(folder: Path, script: str) -> str:
    path = folder / "cc"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def needs_compiler() -> None:
    try:
        build.find_compiler()
    except build.BuildError as reason:
        pytest.skip(str(reason))


def test_two_processes_build_at_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_compiler()
    code = "import runpy; print(runpy.run_path('kernels/cpu/build.py')['build']())"
    unoptimized = a_compiler(fresh, f'exec {build.find_compiler()[0]} "$@" -O0')  # this test is not about speed
    environment = os.environ | {"CC": unoptimized}
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    paths = {process.communicate(timeout=300)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert [str(path) for path in (fresh / "cache").iterdir()] == list(paths), "one library, and nothing half-made"
    monkeypatch.setenv("CC", unoptimized)
    before = Path(paths.pop()).stat().st_mtime_ns
    assert build.build().stat().st_mtime_ns == before, "the second call finds it"


def test_the_key_follows_compiler_and_sources(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (a_compiler(_folder(fresh, v), f"echo version {v}") for v in ("1", "2"))
    keys = {build.source_key([one]), build.source_key([other])}
    for name in ("kernels.c", "simd.h"):
        folder = _folder(fresh, f"changed {name}")
        for source in (*build.HERE.glob("*.c"), *build.HERE.glob("*.h")):
            (folder / source.name).write_text(source.read_text() + ("/* new */" if source.name == name else ""))
        with monkeypatch.context() as patched:
            patched.setattr(build, "HERE", folder)
            keys.add(build.source_key([one]))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    assert len(keys | {build.source_key([one])}) == 5


def _folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


@pytest.mark.parametrize(
    ("script", "complaint"),
    [("echo 'kernels.c:1: error: no such thing' >&2; exit 1", "error: no such thing"), ("exit 3", "exit code 3")],
)
def test_a_broken_compiler_is_told_once_and_the_reference_goes_on(
    script: str, complaint: str, fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", a_compiler(fresh, script))
    weight = torch.randn(64, 64)
    with caplog.at_level(logging.WARNING, logger="qlora"):
        for _ in range(3):
            q = kernels.quantize(weight)
            kernels.matmul(torch.randn(2, 64), q)
    assert torch.equal(q.packed, quant.quantize(weight).packed)
    told = [record.getMessage() for record in caplog.records if record.name == "qlora"]
    assert len(told) == 1
    assert told[0].startswith("the reference backend serves where cpu would be faster: the C kernels are not available")
    assert complaint in told[0]
    assert complaint in kernels.describe_backends()["cpu"]
    with use_backend("cpu"), pytest.raises(ValueError, match=complaint):
        kernels.dequantize(q)


def test_no_compiler_says_what_to_do(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    assert "there is no C compiler (cc, gcc or clang): install one" in str(library.why_missing())
    monkeypatch.setenv("CC", "nothing-of-this-name -m64")
    library.why_missing.cache_clear()
    assert "CC names the compiler 'nothing-of-this-name', which is not there" in str(library.why_missing())


def test_a_cache_that_cannot_be_written_is_a_reason_and_no_crash(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_compiler()
    (fresh / "file").write_text("")
    monkeypatch.setenv("QLORA_CACHE", str(fresh / "file" / "cache"))
    assert "cannot be written" in str(library.why_missing())


def test_cache_folder_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CACHE", "/a")
    assert build.cache_folder() == Path("/a")
    monkeypatch.delenv("QLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert build.cache_folder() == Path("/b/qlora-anatomy")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.cache_folder() == Path.home() / ".cache" / "qlora-anatomy"


def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if library.why_missing() is not None:
        pytest.skip(str(library.why_missing()))
    monkeypatch.setenv("QLORA_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match=r"QLORA_CPU_ISA must be one of portable.*got 'mmx'"):
        kernels.quantize(torch.randn(64))


@pytest.mark.parametrize("unknown", ["flag", "instruction"])
def test_the_newest_instruction_set_is_left_out_where_it_is_not_known(
    unknown: str, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_compiler()
    flags = ("-mno-such-instructions",) if unknown == "flag" else ("-DISA_AVX512", "-mavx512f")
    monkeypatch.setattr(build, "ISA_FLAGS", {"portable": (), build.NEWEST: flags})
    assert library.usable_isas(build.build()) == ("portable",)


def refused_calls():
    q = quant.quantize(torch.randn(32, 64))
    return {
        "K to be a multiple of 32, got 40": lambda: kernels.matmul(
            torch.randn(2, 40), quant.quantize(torch.randn(8, 40))
        ),
        "not torch.float64": lambda: kernels.matmul(torch.randn(2, 64).double(), q),
        "not nf3": lambda: kernels.quantize(torch.randn(64), quant_type="nf3"),
        "not nf5": lambda: kernels.dequantize(quant.quantize(torch.randn(64), quant_type="nf5")),
        "contiguous": lambda: kernels.matmul(
            torch.randn(2, 64), q.with_tensors({"packed": torch.zeros(2048, dtype=torch.uint8)[::2]})
        ),
    }


@pytest.mark.parametrize("reason", list(refused_calls()))
def test_what_the_kernels_do_not_serve_goes_to_the_reference_unless_they_were_asked_for(
    reason: str, fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(dispatch._missing, "cpu", lambda: None)
    with caplog.at_level(logging.WARNING, logger="qlora"):
        refused_calls()[reason]()
    assert reason in caplog.text
    with use_backend("cpu"), pytest.raises(ValueError, match=reason):
        refused_calls()[reason]()


def test_activations_elsewhere_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their address means nothing to a C kernel. (A meta tensor is elsewhere on every machine.)"""
    monkeypatch.setitem(dispatch._missing, "cpu", lambda: None)
    q, away = quant.quantize(torch.randn(8, 64)), torch.empty(8, 64, device="meta")
    calls = (lambda: kernels.matmul(away, q), lambda: kernels.dequantize(q, out=away), lambda: kernels.quantize(away))
    for call in calls:
        with use_backend("cpu"), pytest.raises(ValueError, match="CPU tensors"):
            call()


def test_describe_names_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    if library.why_missing() is not None:
        pytest.skip(str(library.why_missing()))
    monkeypatch.setenv("QLORA_CPU_ISA", "portable")
    assert "portable" in operations.describe()
    assert kernels.describe_backends()["cpu"].startswith("C, portable, ")
