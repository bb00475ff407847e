"""trainers/safety, optimizers and checkpoints: stopped, killed, damaged or diverging runs lose nothing."""

import errno
import json
import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qlora
from optim import FolderTransport, PagedAdamW
from tests.kill_runs import PAGE_BYTES, PHASES, kill_and_resume, result_bytes, tiny_run
from tests.small_base import write_base, write_rows
from trainers import sft
from trainers.checkpoint import all_checkpoints
from trainers.metrics import MetricsFile, read_metrics
from trainers.optimizers import make_optimizer
from trainers.safety import Skips


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    monkeypatch.setattr("trainers.optimizers.PAGE_BYTES", PAGE_BYTES)


@pytest.fixture
def config(base, tmp_path) -> sft.SFTConfig:
    data = write_rows(tmp_path / "rows.jsonl")
    return sft.SFTConfig(
        data=str(data), out=str(tmp_path / "run"), model=str(base), max_steps=8, batch_size=2, accumulation=1, r=4,
        learning_rate=5e-3, dropout=0.1, samples=0, threads=1, save_every=2, method="full",
        optimizer="paged_adamw_8bit", optimizer_budget=0,
    )  # fmt: skip


def unfinish(config: sft.SFTConfig) -> None:
    """As if the run had been killed before it wrote its result."""
    shutil.rmtree(Path(config.out) / ("model" if config.method == "full" else "adapter"))


@pytest.mark.parametrize("method", ["full", "qlora"])
@pytest.mark.parametrize("optimizer", ["paged_adamw", "paged_adamw_8bit"])
def test_no_budget_changes_a_bit_and_a_run_may_go_on_with_another(config, tmp_path, method, optimizer):
    config = replace(config, method=method, optimizer=optimizer)
    whole = replace(config, out=str(tmp_path / "whole"), optimizer_budget=None)
    sft.train(whole, quiet=True)
    sft.train(config, quiet=True)
    assert result_bytes(config.out) == result_bytes(whole.out)
    shutil.rmtree(all_checkpoints(Path(config.out) / "checkpoints")[-1])
    unfinish(config)
    sft.train(replace(config, resume=True, optimizer_budget=10**9), quiet=True)
    assert result_bytes(config.out) == result_bytes(whole.out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(config, tmp_path, number, capsys):
    config = replace(config, max_steps=30, save_every=0)
    whole = replace(config, out=str(tmp_path / "whole"))
    sft.train(whole, quiet=True)
    calls = []

    class Signalling(MetricsFile):
        def append(self, **row):
            super().append(**row)
            calls.append(row["step"])
            if row["step"] == 3:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainers.run.MetricsFile", Signalling)
        patch.setattr(qlora, "parse", lambda *_: config)
        assert qlora.main(["sft"]) == 130
    assert signal.getsignal(number) == before
    assert calls[-1] in (3, 4), "the step under way is finished, no more"
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"stopped by {number.name} after step {calls[-1]}, which is saved" in said
    command = said.partition("go on with: ")[2].split()
    assert command[:2] == ["qlora", "sft"]
    assert not list(Path(config.out).glob("model*"))
    assert qlora.main(command[1:]) == 0
    assert result_bytes(config.out) == result_bytes(whole.out)


def test_a_run_killed_in_training_in_evaluation_and_in_a_checkpoint_ends_with_the_same_bytes(tmp_path):
    """`python tests/kill_runs.py --runs 20` kills more of them."""
    config = tiny_run(tmp_path)
    whole = replace(config, out=str(tmp_path / "whole"))
    sft.train(whole, quiet=True)
    hits = kill_and_resume(config, PHASES, random.Random(0), tmp_path / "mark")
    assert len(hits) == 3
    assert result_bytes(config.out) == result_bytes(whole.out)
    rows = read_metrics(Path(config.out) / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, config.max_steps + 1))
    assert not list(Path(config.out).rglob(".*")), "nothing half-written is left"


@pytest.mark.parametrize("file", ["trainable.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw"])
def test_one_wrong_bit_in_a_checkpoint_is_noticed(config, file, optimizer):
    config = replace(config, optimizer=optimizer, max_steps=2)
    sft.train(config, quiet=True)
    unfinish(config)
    path = Path(config.out) / "checkpoints" / "step-000002" / file
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=rf"{file} is damaged: its bytes are not those that were saved"):
        sft.train(replace(config, resume=True), quiet=True)


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_while_a_checkpoint_is_written_leaves_the_one_before(config, monkeypatch):
    save = PagedAdamW.save_state

    def full(self, folder, names=None):
        full_disk() if "step-000004" in str(folder) else save(self, folder, names)

    monkeypatch.setattr(PagedAdamW, "save_state", full)
    message = (
        r"checkpoints/step-000004 could not be written: No space left on device; step-000002 is whole; go on with: "
    )
    with pytest.raises(OSError, match=message + r"qlora sft --config \S+/config.json --resume$"):
        sft.train(config, quiet=True)
    monkeypatch.undo()
    folder = Path(config.out) / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-000002"], "nothing half-written"
    sft.train(replace(config, resume=True), quiet=True)
    assert all_checkpoints(folder)[-1].name == "step-000008"


@pytest.mark.parametrize(
    ("function", "file", "then"),
    [
        ("trainers.results.save_model", "model", "step-000008 is whole; go on with: qlora sft"),
        ("trainers.run.MetricsFile.append", "metrics.jsonl", "no checkpoint was saved before it"),
        ("pathlib.Path.write_text", "config.json", ""),
    ],
)
def test_a_disk_that_fills_elsewhere_is_one_line_that_names_the_file(config, monkeypatch, function, file, then):
    with monkeypatch.context() as patch:
        patch.setattr(function, full_disk)
        with pytest.raises(OSError, match=rf"{file} could not be written: No space left on device(; )?{then}"):
            sft.train(config, quiet=True)
    if file == "model":
        sft.train(replace(config, resume=True), quiet=True)
        assert result_bytes(config.out)
    assert not list(Path(config.out).glob("*.tmp"))


def test_a_read_only_folder_is_one_line_before_anything_is_trained(config, monkeypatch, capsys):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(qlora, "parse", lambda *_: config)
    monkeypatch.setattr("pathlib.Path.mkdir", read_only)
    assert qlora.main(["sft"]) == 2
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == f"qlora sft: {config.out} could not be written: Read-only file system"
    )


def test_a_spill_folder_that_fails_in_a_step_loses_nothing_and_says_how_to_go_on(config, monkeypatch):
    whole = replace(config, out=f"{config.out}-whole")
    sft.train(whole, quiet=True)
    step, calls = PagedAdamW.step, []

    def failing(self, closure=None):
        calls.append(1)
        if len(calls) == 4:
            raise FolderTransport(config.out, torch.device("cpu")).failure(errno.EIO)
        return step(self, closure)

    with monkeypatch.context() as patch:
        patch.setattr(PagedAdamW, "step", failing)
        message = (
            rf"a page of optimizer state in {config.out} cannot be moved: {os.strerror(errno.EIO)}; step-000002 is "
        )
        with pytest.raises(OSError, match=message + r"whole; go on with: qlora sft --config \S+/config.json --resume$"):
            sft.train(config, quiet=True)
    sft.train(replace(config, resume=True), quiet=True)
    assert result_bytes(config.out) == result_bytes(whole.out)


def test_a_damaged_checkpoint_is_named_with_the_one_before_it(config):
    sft.train(replace(config, max_steps=4), quiet=True)
    unfinish(config)
    last = Path(config.out) / "checkpoints" / "step-000004"
    (last / "state.json").write_text("")
    with pytest.raises(ValueError, match=rf"state.json cannot be read: .*; delete {last} to go on from step-000002"):
        sft.train(replace(config, max_steps=4, resume=True), quiet=True)
    shutil.rmtree(last)
    assert sft.train(replace(config, max_steps=4, resume=True), quiet=True).result.steps == 4


def test_a_run_that_diverges_keeps_its_last_good_state(config, monkeypatch):
    """Step 4 of a run that saves nothing by itself; what it leaves is what a run of 3 steps would have saved."""
    config = replace(config, save_every=0, max_skipped=0)
    whole = replace(config, save_every=3, out=f"{config.out}-whole")
    sft.train(whole, quiet=True)
    real, calls = sft.sft_loss, []

    def poisoned(*arguments):
        calls.append(1)
        return real(*arguments) * (float("inf") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(sft, "sft_loss", poisoned)
    with pytest.raises(ValueError, match=r"loss is inf.*; step 3, the last good state, is in \S+/checkpoints$"):
        sft.train(config, quiet=True)
    kept, wanted = (Path(out) / "checkpoints" / "step-000003" for out in (config.out, whole.out))
    for file in ("trainable.safetensors", "optimizer.safetensors"):
        assert (kept / file).read_bytes() == (wanted / file).read_bytes()
    rng = [json.loads((folder / "state.json").read_text())["torch_rng"] for folder in (kept, wanted)]
    assert rng[0] == rng[1]


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_two_runs_with_one_seed_give_the_same_bytes_with_8bit_pages_too(config, method):
    for name in "ab":
        sft.train(replace(config, method=method, out=config.out + name), quiet=True)
    assert result_bytes(f"{config.out}a") == result_bytes(f"{config.out}b")
    checkpoints = [Path(config.out + name) / "checkpoints" / "step-000008" for name in "ab"]
    for file in ("trainable.safetensors", "optimizer.safetensors"):
        assert (checkpoints[0] / file).read_bytes() == (checkpoints[1] / file).read_bytes()


@pytest.mark.parametrize("line", ['"x"', "[1]", '{"step": "9"}', "{"])
def test_a_line_of_metrics_that_is_none_ends_them(config, line, capsys):
    sft.train(replace(config, max_steps=4), quiet=True)
    path = Path(config.out) / "metrics.jsonl"
    path.write_text(path.read_text() + line + "\n")
    unfinish(config)
    sft.train(replace(config, max_steps=4, resume=True), quiet=True)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]
    path.write_text('{"step": 1}\n')
    assert qlora.main(["inspect", "run", config.out]) == 2
    assert "metrics.jsonl is not a run's: KeyError 'seconds'" in capsys.readouterr().err


def test_another_optimizer_is_another_run(config):
    sft.train(replace(config, max_steps=2), quiet=True)
    with pytest.raises(ValueError, match="has optimizer 'paged_adamw_8bit', now it is 'paged_adamw'"):
        sft.train(replace(config, max_steps=2, optimizer="paged_adamw", resume=True), quiet=True)


def test_updates_that_are_not_finite_are_skipped_counted_and_limited():
    skips = Skips(allowed=2)
    assert skips.is_good(1.0, 1.0)
    assert not skips.is_good(float("nan"), 1.0)
    assert not skips.is_good(1.0, float("inf"))
    assert skips.is_good(1.0, 1.0)
    assert not skips.is_good(1.0, float("nan"))
    assert not skips.is_good(1.0, float("nan"))
    with pytest.raises(ValueError, match=r"loss is nan, gradient norm 1.0, after 2 updates skipped"):
        skips.is_good(float("nan"), 1.0)
    assert skips.total == 4


def test_a_bad_step_changes_nothing_but_the_count(config, monkeypatch):
    config = replace(config, max_steps=4, method="lora", dropout=0.0)
    real = sft.sft_loss
    calls = []

    def poisoned(*arguments):
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(sft, "sft_loss", poisoned)
    sft.train(config, quiet=True)
    rows = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1]
    assert rows[2]["loss"] is None, "JSON has no NaN"
    assert rows[3]["loss"] < rows[0]["loss"]


def test_the_counters_are_in_the_metrics_and_are_shown(config, capsys):
    sft.train(config, quiet=True)
    before, last = read_metrics(Path(config.out) / "metrics.jsonl")[-2:]
    paging = last["paging"]
    assert paging["page_ins"] > 8
    assert paging["resident_bytes"] == 2 * PAGE_BYTES
    assert qlora.main(["inspect", "run", config.out]) == 0
    said = capsys.readouterr().out
    assert f"{paging['misses']:,} misses" in said
    assert "checkpoints  step-000006, step-000008" in said
    assert f"{paging['bytes_in'] - before['paging']['bytes_in']:,} bytes in" in said
    assert f"{last['page_faults']['minor']:,} minor, {last['page_faults']['major']:,} major" in said
    assert "peak memory" in said
    assert "optimizer paged_adamw_8bit" in said
    assert qlora.main(["inspect", "run", str(Path(config.out).parent)]) == 2
    assert "holds no run: it has no config.json" in capsys.readouterr().err


def test_the_flags_choose_the_optimizer(config, tmp_path):
    named = [(f"a.lora_{half}.default", torch.nn.Parameter(torch.ones(8, 2))) for half in "AB"]
    plain = make_optimizer(replace(config, optimizer="adamw"), named)
    assert type(plain) is torch.optim.AdamW
    paged = make_optimizer(replace(config, method="lora", loraplus_ratio=16.0), named)
    assert isinstance(paged, PagedAdamW)
    assert (paged.state_bits, paged.device_budget, paged.spill) == (8, 0, Path(config.out) / "spill")
    assert [group.get("rate_factor", 1.0) for group in paged.param_groups] == [1.0, 16.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sgd"}, "--optimizer must be one of adamw, paged_adamw, paged_adamw_8bit, got 'sgd'"),
        ({"optimizer_budget": -1}, "--optimizer-budget must not be negative, got -1"),
        ({"loraplus_ratio": 16.0}, "--loraplus-ratio is for lora and qlora"),
        ({"method": "lora", "loraplus_ratio": 0.0}, "--loraplus-ratio must be above 0"),
        ({"max_skipped": -1}, "--max-skipped must not be negative"),
    ],
)
def test_flags_out_of_range_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)
