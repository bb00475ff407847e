"""trainers/distill: the loss of a window, the three methods, on- and off-policy, resume to the same bits, refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import qlora
from data.batch import collate
from data.dataset import read_datasets
from lora import LoRAConfig, add_adapter, save_adapter, trainable_parameters
from models import load_model, load_tokenizer
from tests.small_teacher import Made, config_for, make
from trainers import distill, sft
from trainers.distill_setup import distill_warnings, unhealthy
from trainers.metrics import read_metrics
from trainers.prepare import prepare_model
from trainers.teacher import LoadedTeacher, check_vocabularies, learnt, load_teacher

ROOT = Path(__file__).parent.parent
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return make(tmp_path_factory.mktemp("made"))


def examples_of(config):
    tokenizer = load_tokenizer(config.model)
    return tokenizer, sft.encode(config, tokenizer, read_datasets(config)[0]).examples


def result_bytes(out: Path | str) -> bytes:
    files = [Path(out) / "model" / "model.safetensors", Path(out) / "adapter" / "adapter_model.safetensors"]
    return next(path for path in files if path.exists()).read_bytes()


@pytest.mark.parametrize(("beta", "temperature", "w"), [(0.0, 1.0, 0.0), (0.5, 2.0, 0.3), (1.0, 0.7, 1.0)])
def test_a_batch_is_the_loss_of_all_its_logits(made, tmp_path, beta, temperature, w):
    config = config_for(made, tmp_path / "run")
    tokenizer, examples = examples_of(config)
    student, teacher = load_model(made.student), load_teacher(config)
    batch = collate(examples[:5], pad_id=tokenizer.pad_id)
    found = distill.compare(student, teacher, "train", batch, range(5), beta, temperature, torch.full((5,), w))
    where, targets = learnt(batch), batch.input_ids[:, 1:]
    z, u = (m(batch.input_ids, segment_ids=batch.segment_ids)[:, :-1][where] for m in (student, teacher.model))
    apart = distill.distill_loss(z, u, beta=beta, temperature=temperature)
    nll = F.cross_entropy(z, targets[where], reduction="none")
    assert where.sum() == batch.completion_mask[:, 1:].sum()
    torch.testing.assert_close(found.loss, (1 - w) * apart + w * nll, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.nll, nll)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_one_by_eight_equals_eight_by_one_in_loss_and_gradients(made, tmp_path, method):
    config = config_for(made, tmp_path / "run", method=method)
    tokenizer, examples = examples_of(config)
    model, teacher = prepare_model(config), load_teacher(config)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.add_(0.05 * torch.randn_like(parameter))
    num_items = sum(example.n_learnt for example in examples[:8])

    def window(size: int) -> tuple[float, list[torch.Tensor]]:
        loss = 0.0
        for start in range(0, 8, size):
            part = range(start, start + size)
            batch = collate([examples[i] for i in part], pad_id=tokenizer.pad_id)
            w = torch.full((size,), 0.25)
            share = distill.compare(model, teacher, "train", batch, part, 0.5, 1.0, w).loss.sum() / num_items
            share.backward()
            loss += share.item()
        grads = [p.grad.clone() for _, p in trainable_parameters(model)]
        model.zero_grad()
        return loss, grads

    (loss_1, grads_1), (loss_8, grads_8) = window(1), window(8)
    assert loss_1 == pytest.approx(loss_8, rel=32 * EPS)
    for a, b in zip(grads_1, grads_8, strict=True):
        assert (a - b).norm() <= 256 * EPS * b.norm()


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_run_leaves_its_folder_and_comes_nearer_to_its_teacher(made, tmp_path, capsys, method):
    config = config_for(made, tmp_path / "run", method=method, max_steps=12, eval_every=6, samples=2)
    before = distill.evaluate(prepare_model(config), load_teacher(config), *eval_of(config))
    trained = distill.train(config, quiet=True)
    rows = read_metrics(Path(config.out) / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["eval_kl"] < rows[5]["eval_kl"] < before["eval_kl"]
    assert all(row["loss"] == pytest.approx(row["divergence"], rel=8 * EPS) for row in rows)
    assert trained.result.eval_loss == rows[-1]["eval_loss"]
    assert {p.name for p in (Path(config.out) / "plots").iterdir()} == {"loss.png", "divergence.png"}
    assert len((Path(config.out) / "samples.jsonl").read_text().splitlines()) == 2
    assert qlora.main(["inspect", "run", config.out]) == 0
    held_out = f"held out     {rows[-1]['eval_loss']:.4f}, KL to the teacher {rows[-1]['eval_kl']:.4f} at step 12"
    assert held_out in capsys.readouterr().out
    assert distill.evaluate(trained.model, load_teacher(config), *eval_of(config)) == {
        name: rows[-1][name] for name in ("eval_loss", "eval_kl")
    }


def eval_of(config):
    tokenizer = load_tokenizer(config.model)
    examples = sft.encode(config, tokenizer, read_datasets(config)[1]).examples
    return examples, config.batch_size, tokenizer.pad_id


def test_evaluation_is_the_mean_over_all_tokens_of_full_logits(made, tmp_path):
    config = config_for(made, tmp_path / "run")
    student, teacher = load_model(made.student).train(), load_teacher(config)
    examples, size, pad_id = eval_of(config)
    found = distill.evaluate(student, teacher, examples, size, pad_id)
    assert student.training
    nll, kl, n = 0.0, 0.0, 0
    for example in examples:
        ids = torch.tensor([example.ids])
        for t, counts in enumerate(example.completion_mask[1:]):
            if counts:
                p, q = (torch.log_softmax(m(ids)[0, t].double(), dim=0) for m in (student, teacher.model))
                nll, kl, n = nll - p[ids[0, t + 1]].item(), kl + (q.exp() * (q - p)).sum().item(), n + 1
    assert found == {"eval_loss": pytest.approx(nll / n, rel=1e-5), "eval_kl": pytest.approx(kl / n, rel=1e-4)}


def test_with_ce_weight_one_it_is_supervised_fine_tuning(made, tmp_path):
    config = config_for(made, tmp_path / "run", ce_weight=1.0)
    distill.train(config, quiet=True)
    names = {field for field in asdict(config) if field in sft.SFTConfig.__dataclass_fields__}
    plain = sft.SFTConfig(**{name: getattr(config, name) for name in names} | {"out": str(tmp_path / "sft")})
    sft.train(plain, quiet=True)
    ours, theirs = (read_metrics(Path(c.out) / "metrics.jsonl") for c in (config, plain))
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["nll"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["learning_rate"] == b["learning_rate"]
    assert ours[-1]["eval_loss"] == pytest.approx(theirs[-1]["eval_loss"], rel=1e-4)


def test_a_teacher_may_wear_an_adapter_and_be_in_4_bits_and_never_changes(made, tmp_path):
    worn = add_adapter(load_model(made.base), LoRAConfig(r=2))
    with torch.no_grad():
        for _, parameter in trainable_parameters(worn):
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(worn, tmp_path / "adapter")
    config = config_for(made, tmp_path / "run", teacher=str(made.base), teacher_adapter=str(tmp_path / "adapter"))
    ids = torch.arange(30)[None]
    assert torch.equal(load_teacher(config).model(ids), worn.eval()(ids))
    four = load_teacher(replace(config, teacher_quantize="nf4")).model
    assert not any(p.requires_grad for p in four.parameters())
    assert (four(ids) - worn(ids)).abs().max() > 0
    distill.train(replace(config, teacher_quantize="nf4"), quiet=True)
    assert read_metrics(Path(config.out) / "metrics.jsonl")[-1]["eval_kl"] > 0


def assert_same_run(ours, wanted) -> None:
    assert result_bytes(ours.out) == result_bytes(wanted.out)
    rows, wanted_rows = (read_metrics(Path(config.out) / "metrics.jsonl") for config in (ours, wanted))
    for name in ("step", "loss", "divergence", "nll", "eval_kl", "sampled_rows", "learnt_tokens"):
        assert [row.get(name) for row in rows] == [row.get(name) for row in wanted_rows]


def test_a_killed_run_resumes_to_the_same_bytes(made, tmp_path):
    """SIGKILL in the middle, with dropout and answers that the student samples."""
    changes = {"on_policy_fraction": 0.5, "method": "lora", "dropout": 0.1}
    config = config_for(made, tmp_path / "run", max_steps=30, save_every=3, eval_every=10, **changes)
    whole = replace(config, out=str(tmp_path / "whole"))
    distill.train(whole, quiet=True)
    script = (
        "import json, sys; from trainers import distill; "
        "distill.train(distill.DistillConfig(**json.loads(sys.argv[1])), quiet=True)"
    )
    arguments = [sys.executable, "-c", script, json.dumps(asdict(config))]
    process = subprocess.Popen(arguments, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) < 2:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    distill.train(replace(config, resume=True), quiet=True)
    assert_same_run(config, whole)


WAYS = {
    "packed, mixed": {"packing": True, "max_seq_length": 120, "ce_weight": 0.3, "beta": 0.5},
    "cached, 4 bits": {"teacher_top_k": 9, "method": "qlora", "temperature": 2.0},
    "on-policy, full": {"on_policy_fraction": 0.5, "ce_weight": 0.2, "group_by_length": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_from_a_checkpoint_to_the_same_bytes(made, tmp_path, way):
    changes = WAYS[way] | ({"teacher_cache": str(tmp_path / "cache")} if "teacher_top_k" in WAYS[way] else {})
    whole = config_for(made, tmp_path / "run", max_steps=9, save_every=3, eval_every=4, **changes)
    distill.train(whole, quiet=True)
    shutil.copytree(whole.out, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / ("model" if whole.method == "full" else "adapter"))
    shutil.rmtree(tmp_path / "copy" / "checkpoints" / "step-000009")
    copy = replace(whole, out=str(tmp_path / "copy"), resume=True)
    distill.train(copy, quiet=True)
    assert_same_run(copy, whole)


def test_resuming_a_finished_run_trains_nothing(made, tmp_path, capsys):
    config = config_for(made, tmp_path / "run", method="qlora")
    first = distill.train(config, quiet=True)
    again = distill.train(replace(config, resume=True))
    assert "is finished already: 6 steps" in " ".join(capsys.readouterr().err.split())
    assert again.result.eval_loss == first.result.eval_loss
    ids = torch.arange(20)[None]
    assert torch.equal(again.model.eval()(ids), first.model.eval()(ids))


def test_on_policy_rows_are_the_students_own_and_carry_no_cross_entropy(made, tmp_path):
    config = config_for(made, tmp_path / "run", on_policy_fraction=1.0, ce_weight=0.0)
    distill.train(config, quiet=True)
    distill.train(replace(config, out=str(tmp_path / "mixed"), ce_weight=0.9), quiet=True)
    rows = read_metrics(Path(config.out) / "metrics.jsonl")
    assert all(row["sampled_rows"] == 4 and "nll" not in row for row in rows)
    assert all(1 <= row["sampled_length"] <= 6 for row in rows)
    assert all(row["learnt_tokens"] == 4 * row["sampled_length"] for row in rows)
    assert result_bytes(config.out) == result_bytes(tmp_path / "mixed")


def test_on_policy_and_dataset_rows_share_a_window(made, tmp_path):
    config = config_for(made, tmp_path / "run", on_policy_fraction=0.5, ce_weight=0.5, max_steps=10)
    distill.train(config, quiet=True)
    rows = read_metrics(Path(config.out) / "metrics.jsonl")
    assert {row["sampled_rows"] for row in rows} >= {1, 2}
    assert all(row["examples"] == 4 for row in rows)
    other = replace(config, out=str(tmp_path / "other"), seed=7)
    distill.train(other, quiet=True)
    assert [row["sampled_rows"] for row in read_metrics(Path(other.out) / "metrics.jsonl")] != [
        row["sampled_rows"] for row in rows
    ]


# What is refused


def changed_tokenizer(made: Made, folder: Path, change) -> Path:
    shutil.copytree(made.teacher, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def swap(content: dict) -> None:
    """Two tokens change their ids: the sizes stay equal."""
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def add(content: dict) -> None:
    token = {"id": 500, "content": "<new>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    content["added_tokens"].append(token | {"normalized": False, "id": len(content["model"]["vocab"])})


@pytest.mark.parametrize("cached", [False, True])
def test_a_teacher_of_another_vocabulary_is_refused_with_one_line(made, tmp_path, capsys, cached):
    for change, wanted in ((swap, "'a' is id"), (add, "'<new>' is missing in")):
        teacher = changed_tokenizer(made, tmp_path / change.__name__, change)
        config = config_for(made, tmp_path / "run", teacher=str(teacher))
        cache = ["--teacher-cache", str(tmp_path / "cache")] if cached else []
        argv = ["distill", "--teacher", str(teacher), "--model", config.model, "--data", config.data]
        assert qlora.main([*argv, "--out", config.out, *cache]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "student and teacher need one vocabulary" in said
        assert wanted in said
        assert not Path(config.out).exists()
        assert not (tmp_path / "cache").exists()


def test_a_model_is_of_its_own_vocabulary(made):
    tokenizer = load_tokenizer(made.student)
    check_vocabularies(tokenizer, load_tokenizer(made.teacher), ("a", "b"))
    vocabulary = tokenizer.vocabulary()
    assert len(vocabulary) == tokenizer.vocab_size
    assert vocabulary.items() >= tokenizer.special_tokens.items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 1.1}, r"beta must lie in \[0, 1\], got 1.1"),
        ({"temperature": 0}, "temperature must be positive, got 0"),
        ({"ce_weight": -0.1}, r"--ce-weight must lie in \[0, 1\], got -0.1"),
        ({"on_policy_fraction": 2}, r"--on-policy-fraction must lie in \[0, 1\], got 2"),
        ({"on_policy_fraction": 0.5, "teacher_cache": "x"}, "--teacher-cache cannot judge answers that the student"),
        ({"on_policy_fraction": 0.5, "packing": True}, "--packing takes rows of known length"),
        ({"on_policy_fraction": 0.5, "learn": "everything"}, "--learn everything leaves none"),
        ({"teacher_top_k": 0}, "--teacher-top-k must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1, got 0"),
        ({"sampling_temperature": 0}, "--sampling-temperature must be positive, got 0"),
        ({"teacher_quantize": "int4"}, "--teacher-quantize must be one of none, nf4, fp4, got 'int4'"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
    ],
)
def test_a_flag_outside_its_range_is_refused(made, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config_for(made, tmp_path / "run", **changes)


def test_sampling_needs_prompts_and_room_for_an_answer(made, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "Hello, how are you? I am fine."}\n')
    config = config_for(made, tmp_path / "run", on_policy_fraction=0.5, eval_data=None)
    with pytest.raises(ValueError, match="--on-policy-fraction needs prompts, and plain text has none"):
        distill.train(replace(config, data=str(tmp_path / "text.jsonl")), quiet=True)
    with pytest.raises(ValueError, match=r"with --max-new-tokens 250 the student would leave its context of 256"):
        distill.train(replace(config, max_new_tokens=250), quiet=True)
    assert not Path(config.out).exists()


def test_a_run_may_not_go_on_as_another(made, tmp_path):
    config = config_for(made, tmp_path / "run")
    distill.train(config, quiet=True)
    with pytest.raises(ValueError, match=r"has beta 0\.0, now it is 1\.0"):
        distill.train(replace(config, resume=True, beta=1.0), quiet=True)


def test_what_seldom_works_is_said(made, tmp_path):
    config = config_for(made, tmp_path / "run")
    small, large = load_model(made.student), load_model(made.teacher)

    def said(student, teacher, longest=10, **changes):
        return " ".join(distill_warnings(replace(config, **changes), student, LoadedTeacher(teacher), longest))

    assert said(small, large) == ""
    assert "this is supervised fine-tuning" in said(small, large, ce_weight=1.0)
    assert "about 9 times smaller" in said(small, large, ce_weight=0.5, temperature=3.0)
    assert "it may know better than it is taught" in said(large, small)
    assert "an example has 300 tokens, the teacher's context is 256" in said(small, large, longest=300)


def test_what_goes_wrong_is_said_once(made, tmp_path, capsys):
    config = config_for(made, tmp_path / "run", on_policy_fraction=1.0, max_new_tokens=1, max_steps=4, eval_every=1)
    distill.train(replace(config, learning_rate=0.3, schedule="constant", max_grad_norm=0.0))
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("nearly all sampled answers are cut at --max-new-tokens") == 1
    assert said.count("further from its teacher than at the last evaluation") == 1
    assert list(unhealthy(config, {"eval_kl": 1.0, "sampled_length": 0.5}, 1.0)) == []
    assert list(unhealthy(config, {"eval_kl": 1.0}, None)) == []


def test_the_start_of_a_run_says_what_it_does(made, tmp_path, capsys):
    changes = {"on_policy_fraction": 0.25, "ce_weight": 0.5, "beta": 0.5, "max_steps": 1}
    distill.train(config_for(made, tmp_path / "run", **changes))
    said = " ".join(capsys.readouterr().err.split())
    assert f"teacher: {made.teacher}; loss: 0.5 · Jensen-Shannon with β = 0.5 at temperature 1" in said
    assert "+ 0.5 · cross-entropy; 25% of the answers sampled" in said
    assert "before: loss" in said
