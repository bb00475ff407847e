"""The memory planner's exact parts, against published counts, against the bytes that tensors really hold, and turned
round: what fits. The estimates are in test_memory_measured.py, published figures in test_memory_published.py."""

import dataclasses
import json

import pytest
import torch

import qlora
from lora import LinearNF4, count_parameters, trainable_parameters
from models import Decoder, DecoderConfig, save_model
from models.well_known import WELL_KNOWN
from optim import PagedAdamW
from trainers.memory import Setup, largest, largest_batch, largest_model, longest_sequence, plan, plan_of_model
from trainers.memory_exact import adapter_tensors, count, dense_tensors, four_bits, optimizer_state

from .live_memory import model_of
from .small_llama import EVERY, small_config

PUBLISHED = {  # parameters and those in 4 bits, in billions; LoRA parameters at r = 16; bf16, nf4, nf4 with DQ in GB
    "llama-2-7b": (6.7384, 6.4760, 39_976_960, 13.477, 4.168, 3.866),
    "llama-3.1-8b": (8.0303, 6.9793, 41_943_040, 16.061, 6.028, 5.702),
    "llama-3.2-1b": (1.2358, 0.9731, 11_272_192, 2.472, 1.073, 1.027),
    "llama-3.2-3b": (3.2127, 2.8186, 24_313_856, 6.425, 2.374, 2.242),
    "qwen2.5-0.5b": (0.4940, 0.3578, 8_798_208, 0.988, 0.474, 0.457),
    "qwen2.5-7b": (7.6156, 6.5253, 40_370_176, 15.231, 5.851, 5.547),
}
ELSEWHERE = {"smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384,
             "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688, "qwen2.5-14b": 14_770_033_664,
             "qwen2.5-32b": 32_763_876_352, "qwen2.5-72b": 72_706_203_648, "mistral-7b": 7_241_732_096,
             "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192, "llama-3.1-70b": 70_553_706_496}  # fmt: skip


def bytes_of(planned: object, *names: str) -> int:
    return sum(part.nbytes for part in planned.always if part.name in names)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", PUBLISHED)
def test_well_known_counts(name: str) -> None:
    total, linear, adapters, bf16, nf4, double = PUBLISHED[name]
    config, counts = WELL_KNOWN[name], count(WELL_KNOWN[name])
    assert (round(counts.total / 1e9, 4), round(counts.linear / 1e9, 4)) == (total, linear)
    assert sum(adapter_tensors(config, 16)) == adapters
    assert round(2 * counts.total / 1e9, 3) == bf16
    for double_quant, wanted in ((False, nf4), (True, double)):
        found = four_bits(config, 64, double_quant)
        held = found.codes + found.scales + 2 * (counts.total - counts.linear)
        assert held / 1e9 == pytest.approx(wanted, abs=6e-4)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_other_counts(name: str) -> None:
    assert count(WELL_KNOWN[name]).total == ELSEWHERE[name]
    assert sum(dense_tensors(WELL_KNOWN[name])) == ELSEWHERE[name]


@pytest.mark.parametrize("name", EVERY)
def test_every_family_is_counted(name: str) -> None:
    config = small_config(**EVERY[name])
    sizes = sorted(parameter.numel() for parameter in Decoder(config).parameters())
    assert sorted(dense_tensors(config)) == sizes
    assert count(config).total == sum(sizes)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_weights_and_adapters_are_the_bytes_held(method: str, double_quant: bool) -> None:
    config = small_config(hidden_size=72, intermediate_size=104, qkv_bias=True, architecture="Qwen2ForCausalLM")
    setup = Setup(method=method, double_quant=double_quant, r=5, dtype="bf16", sequence_length=32)
    model, planned = model_of(config, setup), plan(config, setup)
    four_bit = [module.quantized.nbytes for module in model.modules() if isinstance(module, LinearNF4)]
    assert sum(four_bit) == bytes_of(planned, "4-bit weights", "scales of the 4-bit weights")
    trained = trainable_parameters(model)
    assert bytes_of(planned, "adapters") == sum(parameter.nbytes for _, parameter in trained)
    assert planned.trained == count_parameters(model)[0]
    live = plan_of_model(model, setup)
    assert (live.total, live.exact) == (planned.total, planned.exact)


@pytest.mark.parametrize(("optimizer", "budget"), [("paged_adamw", None), ("paged_adamw_8bit", None),
                                                    ("paged_adamw", 20 << 20), ("paged_adamw", 0)])  # fmt: skip
def test_gradients_and_state_are_the_bytes_held(optimizer: str, budget: int | None, tmp_path) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3_000_000, 5000, 130, 1_000_001)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    bits = 8 if optimizer.endswith("8bit") else 32
    made = PagedAdamW(parameters, state_bits=bits, device_budget=budget, spill=tmp_path)
    made.step()
    state = optimizer_state([p.numel() for p in parameters], optimizer, budget)
    assert state.fast == made.stats["resident_bytes"]
    if budget is not None:
        assert state.spilled == pytest.approx(made.stats["spilled_bytes"], abs=8 << 20)
    made.close()


def test_torch_adamw_state_is_the_bytes_held() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (300, 77)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    made = torch.optim.AdamW(parameters)
    made.step()
    held = sum(tensor.nbytes for state in made.state.values() for tensor in state.values())
    assert optimizer_state([300, 77], "adamw").fast == held


@pytest.mark.parametrize("trainer", ["sft", "dpo", "orpo", "grpo"])
def test_qlora_never_needs_more_than_lora(trainer: str) -> None:
    """On a GPU too, where a 4-bit weight is made dense for a moment; and for a model of one layer of width 64."""
    smallest = DecoderConfig(512, 64, 4096, 1, 4, 4, 16, 2048, tie_word_embeddings=True)
    for config in (smallest, *WELL_KNOWN.values()):
        for dtype in ("bf16", "fp32"):
            setup = Setup(trainer=trainer, dtype=dtype, on_gpu=True, batch_size=8)
            totals = [plan(config, dataclasses.replace(setup, method=m)).total for m in ("qlora", "lora", "full")]
            assert totals[0] <= totals[1]
            assert config is smallest or totals[1] <= totals[2]


def test_what_fits_is_the_largest() -> None:
    config, setup, budget = WELL_KNOWN["llama-3.1-8b"], Setup(dtype="bf16", batch_size=1), 24 * 10**9
    batch = largest_batch(config, setup, budget)
    fits = [plan(config, dataclasses.replace(setup, batch_size=n)).total <= budget for n in (batch, batch + 1)]
    assert fits == [True, False]
    length = longest_sequence(config, setup, budget)
    fits = [plan(config, dataclasses.replace(setup, sequence_length=n)).total <= budget for n in (length, length + 64)]
    assert fits == [True, False]
    assert largest_model(WELL_KNOWN, setup, 10**8) is None
    assert largest_batch(config, dataclasses.replace(setup, method="full"), budget) == 0


@pytest.mark.parametrize("edge", [0, 1, 2, 3, 7, 8, 99, 100, 1000])
def test_largest(edge: int) -> None:
    assert largest(lambda n: n <= edge, 100) == min(edge, 100)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"method": "half"}, "--method must be one of full, lora, qlora, got 'half'"),
     ({"sequence_length": 5000}, "--sequence-length 5,000 is beyond the model's context of 64"),
     ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
     ({"trainer": "grpo", "sequence_length": 64}, "above --max-completion-length 256, got 64"),
     ({"sequence_length": 8, "targets": ("w1",)}, "target_modules must be of q_proj.*got 'w1'")],
)  # fmt: skip
def test_what_no_trainer_takes(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(small_config(), Setup(**{"sequence_length": 32} | change))


def test_command(tmp_path, capsys) -> None:
    out, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    args = ["memory", "llama-3.1-8b", "--batch-size", "1", "--json", str(out), "--plot", str(picture)]
    assert qlora.main(args) == 0
    said = json.loads(out.read_text())
    setup = Setup(method="qlora", batch_size=1, dtype="bf16")
    assert said["plans"]["qlora"]["total"] == plan(WELL_KNOWN["llama-3.1-8b"], setup).total
    assert sum(part["bytes"] for part in said["plans"]["lora"]["parts"]) == said["plans"]["lora"]["total"]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("4-bit weights", "exact", "80 GB"))


def test_command_reads_a_config_and_a_live_model(tmp_path, capsys) -> None:
    save_model(Decoder(small_config()), tmp_path / "model")
    args = ["--method", "lora", "--sequence-length", "16", "--dtype", "fp32", "--json"]
    for n, source in enumerate((tmp_path / "model" / "config.json", tmp_path / "model")):
        load = ["--load"] if n else []
        assert qlora.main(["memory", str(source), *args, str(tmp_path / f"{n}.json"), *load]) == 0
    totals = [json.loads((tmp_path / f"{n}.json").read_text())["plans"]["lora"]["total"] for n in (0, 1)]
    assert totals[0] == totals[1]
    assert qlora.main(["memory", "llama-9"]) == 2
    assert "llama-9" in capsys.readouterr().err
