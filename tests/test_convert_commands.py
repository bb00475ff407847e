"""qlora quantize and qlora merge: what they write loads again, the report holds true numbers, a merge that costs more
than the adapter brings is called out, and what a user gets wrong is one line that leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import qlora
from commands.merge import complaints, sample
from lora import LoRAConfig, add_adapter, load_adapter, merge_adapter, quantize_model, save_adapter
from lora.adapters import lora_layers
from models import Decoder, load_model, load_tokenizer
from models.compare import Difference, compare, outputs
from tests.small_base import ROWS, write_base, write_rows
from tests.test_qlora import fails


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, rows.jsonl, and adapters of three strengths."""
    folder = tmp_path_factory.mktemp("made")
    write_base(folder / "base")
    write_rows(folder / "rows.jsonl")
    for name, strength in (("strong", 1.0), ("small", 0.002), ("none", 0.0)):
        model = add_adapter(load_model(folder / "base"), LoRAConfig(r=4))
        with torch.no_grad():
            for layer in lora_layers(model).values():
                layer.lora_B["default"].normal_(std=strength)
        save_adapter(model, folder / name)
    return folder


def run(*argv: object) -> None:
    assert qlora.main([str(word) for word in argv]) == 0


@torch.no_grad()
def logits(model: Decoder) -> torch.Tensor:
    return model(torch.arange(20)[None])


@pytest.mark.parametrize(
    "flags", [(), ("--quant-type", "fp4", "--blocksize", 32, "--no-double-quant", "--dtype", "bf16")]
)
def test_quantize_writes_the_model_that_load_model_makes(flags: tuple, made: Path, tmp_path: Path, capsys) -> None:
    run("quantize", made / "base", tmp_path / "out", *flags)
    said = capsys.readouterr().out
    options = {"quantize": "fp4", "blocksize": 32, "double_quant": False, "dtype": torch.bfloat16} if flags else {}
    wanted = load_model(made / "base", **({"quantize": "nf4"} | options))
    written = load_model(tmp_path / "out")
    assert torch.equal(logits(written), logits(wanted))
    assert written.compute_dtype == wanted.compute_dtype
    assert load_tokenizer(tmp_path / "out").encode("hello") == load_tokenizer(made / "base").encode("hello")
    q = written.model.layers[0].mlp.up_proj.quantized
    assert f"14 linear layers in {q.quant_type}, blocks of {q.blocksize}" in said
    assert f"{q.bits_per_param:.1f}" in said


def test_a_4_bit_folder_is_quantized_no_further(made: Path, tmp_path: Path, capsys) -> None:
    run("quantize", made / "base", tmp_path / "once", "--blocksize", 128)
    run("quantize", tmp_path / "once", tmp_path / "twice")
    assert "blocks of 128" in capsys.readouterr().out.splitlines()[2]
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "twice"))
    assert first == second


def test_a_dense_merge_is_the_model_with_its_adapter(made: Path, tmp_path: Path, capsys) -> None:
    run("merge", made / "base", made / "strong", tmp_path / "out")
    adapted = load_adapter(load_model(made / "base"), made / "strong")
    merged = load_model(tmp_path / "out")
    tokenizer = load_tokenizer(made / "base")
    rows = sample(tokenizer, None, 512)
    cost = compare(outputs(adapted, rows), outputs(merged, rows))  # type: ignore[arg-type]
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["merging"] == pytest.approx(cost._asdict(), rel=1e-3)
    gain = compare(outputs(adapted, rows), outputs(load_model(made / "base"), rows))  # type: ignore[arg-type]
    assert report["adapter_effect"] == pytest.approx(gain._asdict(), rel=1e-6)
    assert report["tokens"] == sum(map(len, rows))
    assert set(report["weight_error"]) == set(lora_layers(adapted))
    assert report["total_weight_error"] < 1e-5
    assert cost.kl < 1e-6 < gain.kl
    assert report["warnings"] == []
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("base", ["base", "quantized"])
def test_a_merge_onto_4_bit_weights(base: str, made: Path, tmp_path: Path, capsys) -> None:
    """A base that is quantized as it loads, and one that is a 4-bit folder, give the same files."""
    run("quantize", made / "base", tmp_path / "quantized")
    folder = made / "base" if base == "base" else tmp_path / "quantized"
    flags = ("--quantize", "nf4", "--onto", "held") if base == "base" else ()
    run("merge", folder, made / "strong", tmp_path / "out", "--into", "nf4", "--data", made / "rows.jsonl", *flags)
    merged = load_model(tmp_path / "out")
    wanted = load_adapter(load_model(made / "base", quantize="nf4"), made / "strong")
    merge_adapter(wanted, into="nf4")
    assert torch.equal(logits(merged), logits(wanted))  # type: ignore[arg-type]
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["text"] == str(made / "rows.jsonl")
    assert (report["onto"], list(report["tried"])) == ("held", ["held"])
    assert report["tokens"] <= 512
    assert 0 < report["merging"]["kl"] < 0.5 * report["adapter_effect"]["kl"]
    assert 0.01 < report["total_weight_error"] < 1
    assert report["warnings"] == []
    assert "merged into nf4" in capsys.readouterr().out


def test_a_merge_into_4_bits_tries_the_original_weights_too(made: Path, tmp_path: Path, capsys) -> None:
    """quantize(W + s·BA) and quantize(Ŵ + s·BA), both compared with Ŵ and the adapter; the nearer one is written."""
    flags = ("--into", "nf4", "--quantize", "nf4", "--blocksize", "128")
    reports = {}
    for onto in ("held", "original", "auto"):
        run("merge", made / "base", made / "strong", tmp_path / onto, *flags, "--onto", onto)
        reports[onto] = json.loads((tmp_path / onto / "merge_report.json").read_text())
    wanted = load_adapter(load_model(made / "base"), made / "strong")
    merge_adapter(wanted)
    quantize_model(wanted, blocksize=128)
    assert torch.equal(logits(load_model(tmp_path / "original")), logits(wanted))  # type: ignore[arg-type]
    assert reports["auto"]["tried"] == {onto: reports[onto]["merging"] for onto in ("held", "original")}
    best = min(("held", "original"), key=lambda onto: reports[onto]["merging"]["kl"])
    assert reports["auto"]["onto"] == best
    for key in ("merging", "weight_error", "adapter_effect"):
        assert reports["auto"][key] == reports[best][key]
    assert (tmp_path / "auto" / "model.safetensors").read_bytes() == (
        tmp_path / best / "model.safetensors"
    ).read_bytes()
    assert f"onto the {best} weights" in " ".join(capsys.readouterr().out.split())


def test_onto_the_original_weights_the_layers_without_an_adapter_are_in_4_bits_too(made: Path, tmp_path: Path) -> None:
    save_adapter(add_adapter(load_model(made / "base"), LoRAConfig(r=4, target_modules=["q_proj"])), tmp_path / "q")
    flags = ("--into", "nf4", "--quantize", "nf4", "--onto", "original")
    run("merge", made / "base", tmp_path / "q", tmp_path / "out", *flags)
    wanted = load_model(made / "base", quantize="nf4")  # B is zero: nothing but the form changes
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(wanted))


def test_updates_below_half_a_step_are_lost_on_4_bit_weights_and_that_is_called_out(
    made: Path, tmp_path: Path, capsys
) -> None:
    run("merge", made / "base", made / "small", tmp_path / "out", "--into", "nf4", "--quantize", "nf4")
    assert "warning: merging into nf4 loses" in " ".join(capsys.readouterr().out.split())
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["merging"]["kl"] >= 0.5 * report["adapter_effect"]["kl"] > 0
    assert report["total_weight_error"] > 0.9
    assert len(report["warnings"]) == 1
    run("merge", made / "base", made / "small", tmp_path / "dense", "--quantize", "nf4")
    assert "warning" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*share one weight in this model")
@pytest.mark.parametrize("into", ["dense", "nf4"])
def test_what_an_adapter_has_beside_its_low_rank_matrices_is_merged_too(into: str, made: Path, tmp_path: Path) -> None:
    """An adapter on the embeddings, and a head trained whole: both stay dense, and are tied no longer."""
    targets = ["embed_tokens", "q_proj"]
    model = add_adapter(load_model(made / "base"), LoRAConfig(r=4, target_modules=targets, modules_to_save=["lm_head"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name or "modules_to_save" in name:
                parameter.normal_(std=0.1)
    save_adapter(model, tmp_path / "adapter")
    run("merge", made / "base", tmp_path / "adapter", tmp_path / "out", "--into", into, "--quantize", "nf4")
    merged = load_model(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert not merged.config.tie_word_embeddings
    assert {"model.embed_tokens", "lm_head"} < set(report["weight_error"])
    assert max(report["weight_error"][path] for path in ("model.embed_tokens", "lm_head")) < 1e-6
    wanted = load_adapter(load_model(made / "base", quantize="nf4"), tmp_path / "adapter")
    rows = sample(load_tokenizer(made / "base"), None, 512)
    cost = compare(outputs(wanted, rows), outputs(merged, rows))  # type: ignore[arg-type]
    assert cost.kl == pytest.approx(report["merging"]["kl"], rel=1e-3, abs=1e-9)
    assert cost.kl < 0.5 * report["adapter_effect"]["kl"]


def test_a_merged_model_speaks_as_its_adapter_was_trained(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "strong", tmp_path / "adapter")
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    (tmp_path / "adapter" / "chat_template.jinja").write_text(template)
    run("merge", made / "base", tmp_path / "adapter", tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").chat_template == template


def test_an_adapter_that_does_nothing_is_called_out(made: Path, tmp_path: Path, capsys) -> None:
    run("merge", made / "base", made / "none", tmp_path / "out")
    assert "warning: the adapter changes nothing on this text" in capsys.readouterr().out


@pytest.mark.parametrize(("cost", "gain", "n_warnings"), [(0.09, 0.2, 0), (0.1, 0.2, 1), (0.3, 0.2, 1), (0.0, 0.0, 1)])
def test_when_a_merge_is_called_out(cost: float, gain: float, n_warnings: int) -> None:
    """From half of the adapter's own KL on, and when the adapter does nothing."""
    assert len(complaints("nf4", Difference(cost, 1.0), Difference(gain, 1.0))) == n_warnings


def test_the_sample_is_no_longer_than_asked(made: Path) -> None:
    tokenizer = load_tokenizer(made / "base")
    for tokens in (1, 50, 10_000):
        rows = sample(tokenizer, str(made / "rows.jsonl"), tokens)
        assert sum(map(len, rows)) <= tokens
        assert all(rows)
    assert len(rows) == len(ROWS)


def test_what_a_user_gets_wrong_is_one_line(made: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    out = tmp_path / "out"
    assert "is no model folder" in fails(capsys, "quantize", made / "base", tmp_path / "notes")
    assert "is no model folder" in fails(capsys, "merge", made / "base", made / "strong", tmp_path / "notes")
    assert "blocksize must be one of" in fails(capsys, "quantize", made / "base", out, "--blocksize", "100")
    assert "no such folder or file" in fails(capsys, "quantize", tmp_path / "nowhere", out)
    assert "add --quantize nf4" in fails(capsys, "merge", made / "base", made / "strong", out, "--into", "nf4")
    assert "adapter_config.json" in fails(capsys, "merge", made / "base", tmp_path / "notes", out)
    assert "--tokens must be at least 1" in fails(capsys, "merge", made / "base", made / "strong", out, "--tokens", "0")
    assert "nowhere.jsonl" in fails(
        capsys, "merge", made / "base", made / "strong", out, "--data", tmp_path / "nowhere.jsonl"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes"]
    run("quantize", made / "base", tmp_path / "four")
    assert "method full" in fails(
        capsys, "sft", "--model", tmp_path / "four", "--data", made / "rows.jsonl", "--out", out, "--method", "full"
    )
