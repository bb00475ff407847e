"""trainers/sft: the loss, the window, the three methods; a run can be trusted: resume, same bits, untouched base."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kernels
from data.batch import collate
from data.encode import encode_dataset
from data.schema import detect
from lora import LinearNF4, load_adapter, trainable_parameters
from models import load_model, load_tokenizer
from tests import reference
from tests.small_base import ROWS, write_base, write_rows
from trainers import sft
from trainers.checkpoint import all_checkpoints
from trainers.logprobs import per_token_nll
from trainers.metrics import read_metrics

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def config(base, tmp_path) -> sft.SFTConfig:
    data = write_rows(tmp_path / "rows.jsonl")
    return sft.SFTConfig(
        data=str(data), out=str(tmp_path / "run"), model=str(base), max_steps=6, batch_size=2, accumulation=2, r=4,
        learning_rate=5e-3, dropout=0.1, samples=0, threads=1,
    )  # fmt: skip


def batch_of(base, n=8):
    tokenizer = load_tokenizer(base)
    schema = detect(ROWS, "rows")
    examples = encode_dataset(tokenizer, ROWS[:n], schema, max_seq_length=128, path="rows").examples
    return tokenizer, examples


def test_the_loss_is_the_reference_token_mean():
    nll = torch.rand(3, 5)
    mask = torch.tensor([[0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]])
    by_hand = sum(nll[i, t].item() for i in range(3) for t in range(5) if mask[i, t + 1]) / 5
    assert sft.sft_loss(nll, mask).item() == pytest.approx(by_hand, rel=1e-6)
    assert sft.sft_loss(nll, mask, num_items=10).item() == pytest.approx(by_hand / 2, rel=1e-6)
    assert sft.sft_loss(nll, torch.zeros_like(mask)).item() == 0.0


def test_per_token_nll_is_cross_entropy_of_the_logits(base):
    tokenizer, examples = batch_of(base)
    model = load_model(base)
    batch = collate(examples, pad_id=tokenizer.pad_id)
    nll = per_token_nll(model, batch.input_ids, batch.segment_ids, batch.completion_mask)
    logits = model(batch.input_ids, segment_ids=batch.segment_ids).double()
    for i in range(2):
        for t in range(batch.input_ids.shape[1] - 1):
            if batch.completion_mask[i, t + 1]:
                wanted = reference.token_cross_entropy(logits[i, t].tolist(), int(batch.input_ids[i, t + 1]))[0]
                assert nll[i, t].item() == pytest.approx(wanted, abs=64 * torch.finfo(torch.float32).eps)
            else:
                assert nll[i, t] == 0


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_one_by_eight_equals_eight_by_one_in_loss_and_gradients(base, config, method):
    """Rows of unequal length, double precision aside: the gradients differ by rounding only."""
    tokenizer, examples = batch_of(base)
    model = sft.prepare_model(replace(config, method=method, dropout=0.0))
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.add_(0.05 * torch.randn_like(parameter))
    num_items = sum(sum(example.completion_mask[1:]) for example in examples)

    def window(size: int) -> tuple[float, list[torch.Tensor]]:
        loss = 0.0
        for start in range(0, 8, size):
            batch = collate(examples[start : start + size], pad_id=tokenizer.pad_id)
            nll = per_token_nll(model, batch.input_ids, batch.segment_ids, batch.completion_mask)
            share = sft.sft_loss(nll, batch.completion_mask, num_items)
            share.backward()
            loss += share.item()
        grads = [p.grad.clone() for _, p in trainable_parameters(model)]
        model.zero_grad()
        return loss, grads

    (loss_1, grads_1), (loss_8, grads_8) = window(1), window(8)
    eps = torch.finfo(torch.float32).eps
    assert loss_1 == pytest.approx(loss_8, rel=8 * eps)
    for a, b in zip(grads_1, grads_8, strict=True):
        assert (a - b).norm() <= 64 * eps * b.norm()


def base_bytes(model) -> dict[str, bytes]:
    trained = {name for name, _ in trainable_parameters(model)}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        k: t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for k, t in tensors.items()
        if k not in trained
    }


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_every_byte_of_the_base_is_the_same_after_training(config, method):
    config = replace(config, method=method)
    before = base_bytes(sft.prepare_model(config))
    trained = sft.train(config, quiet=True)
    assert base_bytes(trained.model) == before
    assert any(p.abs().max() > 0 for name, p in trainable_parameters(trained.model) if "lora_B" in name)
    assert any(isinstance(m, LinearNF4) for m in trained.model.modules()) == (method == "qlora")


def test_a_run_leaves_its_folder_and_learns(config, base):
    eval_data = write_rows(Path(config.out).parent / "eval.jsonl", ROWS[:4])
    config = replace(config, max_steps=12, eval_data=str(eval_data), eval_every=6, samples=2, save_every=4)
    trained = sft.train(config, quiet=True)
    out = Path(config.out)
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["eval_loss"] < rows[5]["eval_loss"] < rows[0]["loss"]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000008", "step-000012"]
    assert (out / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "samples.jsonl").read_text().splitlines()) == 2
    assert json.loads((out / "config.json").read_text())["environment"]["threads"] == 1
    reloaded = load_adapter(load_model(base, dtype=torch.float32, quantize="nf4"), out / "adapter")
    ids = torch.arange(20)[None]
    assert torch.equal(reloaded(ids), trained.model.eval()(ids))


def adapter_bytes(out: Path | str) -> bytes:
    return (Path(out) / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_killed_run_resumes_to_the_same_bytes(config, tmp_path):
    """SIGKILL in the middle, dropout on: the adapter's bytes are those of the undisturbed run."""
    config = replace(config, max_steps=30, save_every=3)
    whole = replace(config, out=str(tmp_path / "whole"))
    sft.train(whole, quiet=True)
    out = Path(config.out)
    script = (
        "import json, sys; from trainers import sft; sft.train(sft.SFTConfig(**json.loads(sys.argv[1])), quiet=True)"
    )
    arguments = [sys.executable, "-c", script, json.dumps(config.__dict__)]
    process = subprocess.Popen(arguments, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and len(list((out / "checkpoints").glob("step-*"))) < 2:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    assert not (out / "adapter").exists()
    sft.train(replace(config, resume=True), quiet=True)
    assert adapter_bytes(out) == adapter_bytes(whole.out)
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == list(range(1, 31))


@pytest.mark.parametrize("way", [{"packing": True, "max_seq_length": 90}, {"group_by_length": True}], ids=str)
def test_a_packed_or_grouped_run_learns_every_row_and_resumes_to_the_same_bytes(config, tmp_path, way):
    """24 rows are no multiple of the window: an epoch ends inside one."""
    config = replace(config, max_steps=None, epochs=2, accumulation=1, batch_size=5, save_every=2, **way)
    sft.train(config, quiet=True)
    out, copy = Path(config.out), tmp_path / "copy"
    rows = read_metrics(out / "metrics.jsonl")
    examples = sum(row["examples"] for row in rows)
    assert 2 * len(ROWS) <= examples < 2 * len(ROWS) + rows[-1]["examples"]
    plain = replace(config, packing=False, group_by_length=False, out=str(tmp_path / "plain"))
    sft.train(plain, quiet=True)
    padding, wanted = (
        [row["padding"] for row in read_metrics(Path(folder) / "metrics.jsonl")] for folder in (out, plain.out)
    )
    assert sum(padding) / len(padding) < sum(wanted) / len(wanted)

    shutil.copytree(out, copy)
    shutil.rmtree(copy / "adapter")
    shutil.rmtree(all_checkpoints(copy / "checkpoints")[-1])
    resumed = sft.train(replace(config, out=str(copy), resume=True), quiet=True)
    assert adapter_bytes(out) == adapter_bytes(copy)
    assert resumed.result.loss == rows[-1]["loss"]


@pytest.mark.parametrize("method", ["full", "qlora"])
@pytest.mark.parametrize("save_every", [0, 6])
def test_resuming_a_finished_run_trains_nothing_and_says_so(config, method, save_every, capsys):
    eval_data = write_rows(Path(config.out).parent / "eval.jsonl", ROWS[:4])
    config = replace(config, method=method, save_every=save_every, eval_data=str(eval_data))
    first = sft.train(config, quiet=True)
    metrics = Path(config.out) / "metrics.jsonl"
    before = metrics.read_bytes()
    again = sft.train(replace(config, resume=True))
    assert f"{config.out} is finished already: 6 steps, the last with loss {first.result.loss:.4f}" in said(capsys)
    assert metrics.read_bytes() == before
    assert again.result.loss == first.result.loss
    assert again.result.eval_loss == first.result.eval_loss
    ids = torch.arange(20)[None]
    assert torch.equal(again.model.eval()(ids), first.model.eval()(ids))


def test_a_run_killed_before_its_result_was_saved_saves_it_with_the_real_loss(config):
    first = sft.train(replace(config, save_every=6), quiet=True)
    kept = adapter_bytes(config.out)
    shutil.rmtree(Path(config.out) / "adapter")
    again = sft.train(replace(config, save_every=6, resume=True), quiet=True)
    assert again.result.loss == first.result.loss
    assert adapter_bytes(config.out) == kept


def said(capsys) -> str:
    """What was printed, on one line."""
    return " ".join(capsys.readouterr().err.split())


def test_the_start_of_a_run_says_how_its_rows_are_ordered(config, capsys, tmp_path):
    sft.train(replace(config, max_steps=1), quiet=False)
    assert "an epoch: 24 rows, shuffled, " in said(capsys)
    sft.train(replace(config, max_steps=1, packing=True, max_seq_length=200, out=str(tmp_path / "packed")))
    assert re.search(r"an epoch: 24 examples packed in 6 rows of up to 200 tokens, [\d.]+% padding", said(capsys))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(config, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        sft.train(replace(config, out=str(tmp_path / name), seed=seed), quiet=True)
    a, b, c = (adapter_bytes(tmp_path / name) for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_bf16_stays_within_its_band_of_fp32(config, method, tmp_path):
    """Twenty steps: no loss is further from fp32's than two bf16 roundings of it (measured over 12 runs: under 1)."""
    rate = 1e-3
    losses = {}
    for dtype in ("fp32", "bf16"):
        run = replace(
            config, method=method, dtype=dtype, max_steps=20, dropout=0.0, learning_rate=rate, out=str(tmp_path / dtype)
        )
        sft.train(run, quiet=True)
        losses[dtype] = torch.tensor([row["loss"] for row in read_metrics(tmp_path / dtype / "metrics.jsonl")])
    assert losses["fp32"][-1] < losses["fp32"][0]
    band = 2 * torch.finfo(torch.bfloat16).eps * losses["fp32"]
    assert (losses["bf16"] - losses["fp32"]).abs().le(band).all()


def test_gradient_checkpointing_gives_every_adapter_the_same_gradient(base, config):
    tokenizer, examples = batch_of(base)
    batch = collate(examples, pad_id=tokenizer.pad_id)
    grads = []
    for on in (False, True):
        model = sft.prepare_model(replace(config, gradient_checkpointing=on, dropout=0.0)).train()
        nll = per_token_nll(model, batch.input_ids, batch.segment_ids, batch.completion_mask)
        sft.sft_loss(nll, batch.completion_mask).backward()
        grads.append({name: p.grad for name, p in trainable_parameters(model)})
    assert all(grad is not None for grad in grads[1].values())
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name])
        assert "lora_A" in name or grad.abs().max() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"learning_rate": float("nan")}, "--learning-rate must be above 0, got nan"),
        ({"epochs": 0}, "--epochs must be above 0"),
        ({"warmup_ratio": 1.0}, r"--warmup-ratio must lie in \[0, 1\)"),
        ({"packing": True, "group_by_length": True}, "--packing leaves nothing for --group-by-length to do"),
        ({"method": "dora"}, "--method must be one of full, lora, qlora, got 'dora'"),
    ],
)
def test_a_flag_outside_its_range_is_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


def test_a_used_folder_an_empty_one_and_a_changed_run_are_refused(config):
    with pytest.raises(ValueError, match="--resume needs a run to go on with"):
        sft.train(replace(config, resume=True), quiet=True)
    sft.train(replace(config, max_steps=1), quiet=True)
    with pytest.raises(ValueError, match="holds a run already"):
        sft.train(config, quiet=True)
    with pytest.raises(ValueError, match="has r 4, now it is 8"):
        sft.train(replace(config, max_steps=1, resume=True, r=8), quiet=True)
    write_rows(Path(config.data), ROWS[1:])
    with pytest.raises(ValueError, match="has data_sha256"):
        sft.train(replace(config, max_steps=1, resume=True), quiet=True)


def test_a_loss_that_is_not_finite_stops_the_run(config):
    with kernels.use_backend("reference"), pytest.raises(ValueError, match="training needs finite numbers"):
        sft.train(replace(config, learning_rate=1e30, max_grad_norm=0.0), quiet=True)
