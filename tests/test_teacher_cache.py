"""trainers/teacher_cache.py: what the files hold, the same training from them, resuming, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from data.batch import collate
from data.dataset import read_datasets
from lora import LoRAConfig, add_adapter, save_adapter
from models import load_model, load_tokenizer
from tests.small_teacher import Made, config_for, make
from trainers import distill, sft, teacher_cache
from trainers.distill_setup import distill_warnings, prepare_teacher
from trainers.metrics import read_metrics
from trainers.teacher import learnt, load_teacher


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 examples in files of 6."""
    monkeypatch.setattr(teacher_cache, "PER_FILE", 6)


def cached(made, tmp_path, **changes):
    return config_for(made, tmp_path / "run", teacher_cache=str(tmp_path / "cache"), **changes)


def prepared(config):
    """(tokenizer, examples of both splits, the teacher)."""
    tokenizer = load_tokenizer(config.model)
    splits = zip(("train", "eval"), read_datasets(config), strict=True)
    examples = {name: sft.encode(config, tokenizer, data).examples for name, data in splits}
    return tokenizer, examples, prepare_teacher(config, tokenizer, examples, quiet=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_row_is_the_teachers_top_k_of_a_learnt_token(made, tmp_path, temperature):
    config = cached(made, tmp_path, teacher_top_k=7, temperature=temperature)
    tokenizer, examples, teacher = prepared(config)
    assert sorted(contents(tmp_path / "cache")) == [
        "eval-00000.safetensors", "eval.json", *(f"train-0000{i}.safetensors" for i in range(4)), "train.json",
    ]  # fmt: skip
    model = load_teacher(config).model
    for split, tau in (("train", temperature), ("eval", 1.0)):
        numbers = [3, 0, 2] if split == "eval" else [17, 0, 5, 6]
        batch = collate([examples[split][i] for i in numbers], pad_id=tokenizer.pad_id)
        top, head = teacher.predictions(split, batch, numbers)
        logits = model(batch.input_ids, segment_ids=batch.segment_ids)[:, :-1][learnt(batch)]
        wanted, ids = torch.topk(torch.log_softmax(logits / tau, dim=1), 7)
        assert head is None
        assert top.ids.dtype == torch.int32
        assert torch.equal(top.ids.long(), ids)
        torch.testing.assert_close(top.logps, wanted)


def test_all_tokens_in_the_cache_teach_as_the_teacher_in_memory_does(made, tmp_path):
    V = load_model(made.teacher).config.vocab_size
    config = cached(made, tmp_path, teacher_top_k=V, beta=0.5, ce_weight=0.2, temperature=1.5, packing=True)
    config = replace(config, max_seq_length=120)
    distill.train(config, quiet=True)
    distill.train(replace(config, teacher_cache=None, out=str(tmp_path / "memory")), quiet=True)
    ours, theirs = (read_metrics(Path(out) / "metrics.jsonl") for out in (config.out, tmp_path / "memory"))
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "divergence", "nll"):
            assert a[name] == pytest.approx(b[name], rel=1e-3)
    assert ours[-1]["eval_kl"] == pytest.approx(theirs[-1]["eval_kl"], rel=1e-2)


def test_a_complete_cache_needs_no_teacher(made, tmp_path, monkeypatch):
    config = cached(made, tmp_path)
    prepared(config)
    before = contents(tmp_path / "cache")
    monkeypatch.setattr("trainers.distill_setup.load_teacher", lambda config: pytest.fail("the teacher was loaded"))
    distill.train(config, quiet=True)
    assert contents(tmp_path / "cache") == before


@pytest.mark.parametrize("left", [0, 1, 3])
def test_writing_goes_on_to_the_same_bytes(made, tmp_path, left, monkeypatch):
    """Stopped in the middle of a file, with `left` whole ones."""
    config = cached(made, tmp_path)
    prepared(config)
    whole = contents(tmp_path / "cache")
    for path in sorted((tmp_path / "cache").glob("*-*.safetensors"))[left:]:
        path.unlink()
    (tmp_path / "cache" / "train-00003.safetensors.tmp").write_bytes(b"half")
    written = []
    save = safetensors.torch.save_file
    monkeypatch.setattr(safetensors.torch, "save_file", lambda *a, **k: (written.append(a[1]), save(*a, **k)))
    prepared(config)
    assert len(written) == 5 - left
    assert contents(tmp_path / "cache") == whole


def test_a_split_may_come_later(made, tmp_path):
    config = cached(made, tmp_path)
    tokenizer, examples, _ = prepared(config)
    for path in (tmp_path / "cache").glob("eval*"):
        path.unlink()
    prepare_teacher(config, tokenizer, {"train": examples["train"]}, quiet=True)
    assert not list((tmp_path / "cache").glob("eval*"))
    prepare_teacher(config, tokenizer, examples, quiet=True)
    assert len(list((tmp_path / "cache").glob("eval*"))) == 2


def test_a_cache_of_something_else_is_refused(made, tmp_path):
    config = cached(made, tmp_path)
    prepared(config)
    before = contents(tmp_path / "cache")
    other_rows = tmp_path / "other.jsonl"
    other_rows.write_text(Path(made.data).read_text().splitlines()[0] + "\n")
    for changes, message in (
        ({"data": str(other_rows)}, "the dataset, its chat format, --learn or --max-seq-length differ"),
        ({"learn": "everything"}, "the dataset, its chat format, --learn or --max-seq-length differ"),
        ({"teacher_top_k": 5}, "top_k was 64, now it is 5"),
        ({"temperature": 2.0}, "temperature was 1.0, now it is 2.0"),
        ({"teacher": str(made.base)}, "teacher was .*taught/model', now it is .*base'"),
    ):
        with pytest.raises(ValueError, match=f"cache is a cache of something else: {message}; pass another"):
            prepared(replace(config, **changes))
    assert contents(tmp_path / "cache") == before


def test_a_cache_of_another_tokenizer_is_refused(made, tmp_path):
    config = cached(made, tmp_path)
    tokenizer, examples, _ = prepared(config)
    vocabulary = tokenizer.vocabulary()
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    tokenizer.vocabulary = lambda: vocabulary
    with pytest.raises(ValueError, match="the student's tokenizer differs"):
        prepare_teacher(config, tokenizer, examples, quiet=True)


def test_other_weights_under_the_teachers_name_are_refused(made, tmp_path):
    """Of the teacher, and of the adapter that it wears."""
    teacher, adapter = tmp_path / "teacher", tmp_path / "adapter"
    shutil.copytree(made.base, teacher)
    save_adapter(add_adapter(load_model(made.base), LoRAConfig(r=2)), adapter)
    config = cached(made, tmp_path, teacher=str(teacher), teacher_adapter=str(adapter))
    prepared(config)
    prepared(config)
    for path, key, what in (
        (adapter / "adapter_model.safetensors", "layers.0.mlp.up_proj.lora_B", "adapter differs"),
        (teacher / "model.safetensors", "model.norm", "files differ"),
    ):
        weights = safetensors.torch.load_file(path)
        (name,) = (name for name in weights if key in name)
        weights[name].view(-1)[0] += 1
        safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"cache is a cache of something else: the teacher's {what}; pass another"):
            prepared(config)


def test_damage_is_one_line_that_names_the_file(made, tmp_path):
    config = cached(made, tmp_path)
    _, _, teacher = prepared(config)
    cache = teacher.caches["train"]
    path = tmp_path / "cache" / "train-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"train-00001\.safetensors cannot be read"):
        cache.read([7])
    assert len(cache.read([5]).ids) > 0
    safetensors.torch.save_file({"ids": torch.zeros(1, 64, dtype=torch.int32), "logps": torch.zeros(1, 64)}, path)
    with pytest.raises(ValueError, match=r"must hold \d+ rows for example 8"):
        cache.read([7])
    (tmp_path / "cache" / "train.json").write_text("[")
    with pytest.raises(ValueError, match=r"train\.json cannot be read"):
        prepared(config)
    (tmp_path / "cache" / "train.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match=r"train\.json cannot be read"):
        prepared(config)


def test_more_than_the_vocabulary_is_refused(made, tmp_path):
    with pytest.raises(ValueError, match="k must lie between 1 and the vocabulary's"):
        prepared(cached(made, tmp_path, teacher_top_k=100_000))


def test_a_k_that_leaves_much_to_the_rest_is_said(made, tmp_path):
    config = cached(made, tmp_path, teacher_top_k=1)
    _, _, teacher = prepared(replace(config, teacher=str(made.base)))
    student = load_model(made.student)
    (said,) = distill_warnings(config, student, teacher, 10)
    rest = 1 - teacher.caches["train"].read([0]).logps.exp().mean().item()
    assert f"leave {rest:.0%} of the teacher's probability to the rest" in said
