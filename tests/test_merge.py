"""lora/merge.py: one rounding of the fp32 sum, exact bits back, an honest error, never half a merge."""

import pytest
import torch
from torch import Tensor, nn

import quant
from lora import (
    LinearNF4,
    LoRAConfig,
    LoRALinear,
    MergeReport,
    add_adapter,
    merge_adapter,
    quantize_model,
    save_adapter,
    set_adapter,
    unmerge_adapter,
)
from lora.adapters import lora_layers
from tests import reference
from tests.accuracy import error, exact
from tests.small_llama import small_decoder
from tests.test_attach import IDS, INSIDE, TinyModel, base_bytes, paths_of, randomize_b

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def a_model(kind: str, dtype: torch.dtype = torch.float32, bias: bool = True, **options) -> TinyModel:
    model = TinyModel(bias).to(dtype)
    if kind != "dense":
        quantize_model(model, **options)
    add_adapter(model, LoRAConfig(r=3, alpha=2))
    randomize_b(model)
    return model.eval()


def base_of(layer: LoRALinear) -> Tensor:
    """fp32 (N, K)."""
    base = layer.base_layer
    return quant.dequantize(base.quantized, torch.float32) if isinstance(base, LinearNF4) else base.weight.float()


def exact_sum(layer: LoRALinear) -> Tensor:
    """W + s · BA by loops in float64."""
    A, B = layer.lora_A["default"].tolist(), layer.lora_B["default"].tolist()
    product = exact(reference.matmul_t(B, reference.transpose(A)))
    return base_of(layer).double() + layer.scaling["default"] * product


def fp32_sum(layer: LoRALinear) -> Tensor:
    """W + s · BA, where every operation is in fp32."""
    return base_of(layer) + layer.scaling["default"] * (layer.lora_B["default"] @ layer.lora_A["default"]).detach()


def relative_error(merged: Tensor, layer: LoRALinear) -> float:
    wanted = exact_sum(layer)
    return ((merged.double() - wanted).norm() / (wanted - base_of(layer).double()).norm()).item()


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dense_merge_is_the_fp32_sum_rounded_once(kind: str, dtype: torch.dtype) -> None:
    model = a_model(kind, dtype)
    layers = lora_layers(model)
    report = merge_adapter(model)
    assert paths_of(model, LoRALinear) == []
    for path, layer in layers.items():
        merged = model.get_submodule(path)
        assert type(merged) is nn.Linear
        assert not merged.weight.requires_grad
        assert merged.weight.dtype == dtype
        assert torch.equal(merged.weight, fp32_sum(layer).to(dtype))
        assert torch.equal(merged.bias, layer.base_layer.bias)
        # a product of r = 3 terms, a scaling and a sum: five fp32 roundings at most before the last
        spacing = torch.finfo(torch.float32).eps * 5 + torch.finfo(dtype).eps
        largest = exact_sum(layer).abs().max() + base_of(layer).abs().max()
        assert (merged.weight.double() - exact_sum(layer)).abs().max() <= spacing * largest
        assert report.weight_error[path] == pytest.approx(relative_error(merged.weight, layer), rel=0.01, abs=1e-6)


def test_the_dtype_of_a_merge_can_be_chosen() -> None:
    model = a_model("nf4", torch.bfloat16)
    layers = lora_layers(model)
    merge_adapter(model, dtype=torch.float32)
    for path, layer in layers.items():
        assert torch.equal(model.get_submodule(path).weight, fp32_sum(layer))


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_merged_model_gives_the_logits_of_the_adapter(kind: str, bias: bool) -> None:
    """In float64, but for the sum of the weights: no further off than the whole model in fp32."""
    model = a_model(kind, bias=bias)
    in_fp32 = model(IDS)
    before = model.double()(IDS)
    merge_adapter(model, dtype=torch.float64)
    assert error(model(IDS), before) <= 2 * error(in_fp32, before)


@pytest.mark.parametrize("options", [{}, {"quant_type": "fp4", "blocksize": 32, "double_quant": False}], ids=str)
def test_a_merge_into_nf4_quantizes_the_sum_as_the_base_was(options: dict) -> None:
    model = a_model("nf4", torch.bfloat16, **options)
    layers = lora_layers(model)
    report = merge_adapter(model, into="nf4")
    assert paths_of(model, LinearNF4) == INSIDE
    for path, layer in layers.items():
        merged = model.get_submodule(path)
        expected = quant.quantize(fp32_sum(layer).bfloat16(), **options)
        for name, tensor in expected.tensors().items():
            assert torch.equal(merged.quantized.tensors()[name], tensor)
        assert merged.quantized.dtype == torch.bfloat16
        assert torch.equal(merged.bias, layer.base_layer.bias)
        found = quant.dequantize(merged.quantized)
        assert report.weight_error[path] == pytest.approx(relative_error(found, layer), rel=1e-3)
        assert report.weight_error[path] > 0.01  # four bits show


def test_a_new_adapter_merges_into_the_base_itself() -> None:
    """B = 0: nothing to add. Its error has no size to be relative to, and is the absolute one."""
    model = add_adapter(TinyModel(), LoRAConfig())
    layers = lora_layers(model)
    report = merge_adapter(model)
    assert all(torch.equal(model.get_submodule(path).weight, layer.base_layer.weight) for path, layer in layers.items())
    assert set(report.weight_error.values()) == {0.0}


# Taking it out again


@pytest.mark.parametrize(("kind", "into"), [("dense", "dense"), ("nf4", "dense"), ("nf4", "nf4")])
def test_unmerging_gives_back_the_bits(kind: str, into: str) -> None:
    model = a_model(kind, torch.bfloat16)
    add_adapter(model, LoRAConfig(target_modules=["lm_head"]), "other")
    set_adapter(model, ["default", "other"])
    bits, logits, layers = base_bytes(model), model(IDS), lora_layers(model)
    adapters = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    for _ in range(3):
        report = merge_adapter(model, into=into)
        assert model.adapter_state.active == ("other",)
        assert list(model.adapter_state.configs) == ["other"]
        unmerge_adapter(model, report)
        assert base_bytes(model) == bits
        assert torch.equal(model(IDS), logits)
        assert lora_layers(model) == layers
        assert model.adapter_state.active == ("default", "other")
        assert all(torch.equal(p, adapters[name]) for name, p in model.named_parameters() if name in adapters)


def test_a_merged_adapter_is_no_adapter_any_more(tmp_path) -> None:
    model = a_model("dense")
    merge_adapter(model)
    for use in (set_adapter, merge_adapter):
        with pytest.raises(ValueError, match="no adapter is named 'default'"):
            use(model, "default")
    with pytest.raises(ValueError, match="no adapter is named 'default'"):
        save_adapter(model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_merged_model_takes_a_new_adapter_which_unmerging_would_lose() -> None:
    model = a_model("dense")
    report = merge_adapter(model)
    merged = model(IDS)
    add_adapter(model, LoRAConfig(r=2, target_modules=["q_proj"]))
    assert torch.equal(model(IDS), merged)
    with pytest.raises(ValueError, match=f"would lose the adapters that {INSIDE[0]} has got since"):
        unmerge_adapter(model, report)
    assert torch.equal(model(IDS), merged)


# Refusals


def refused(model: nn.Module, message: str, **options) -> None:
    before, active = {path: id(module) for path, module in model.named_modules()}, model.adapter_state.active
    with pytest.raises(ValueError, match=message):
        merge_adapter(model, **options)
    assert {path: id(module) for path, module in model.named_modules()} == before
    assert model.adapter_state.active == active


def test_an_unknown_adapter_or_destination_is_refused() -> None:
    refused(a_model("dense"), r"no adapter is named 'sft': the model has \['default'\]", name="sft")
    refused(a_model("dense"), "into must be 'dense' or 'nf4', got 'fp8'", into="fp8")


def test_a_dense_layer_among_4_bit_ones_is_refused_before_anything_is_replaced() -> None:
    model = quantize_model(TinyModel(), skip=("lm_head",))
    add_adapter(model, LoRAConfig(target_modules=["q_proj", "lm_head"]))
    assert list(lora_layers(model))[-1] == "lm_head"
    refused(model, "into='nf4' needs a 4-bit base", into="nf4")


def test_a_sum_that_is_not_finite_is_refused_before_anything_is_replaced() -> None:
    model = a_model("nf4")
    with torch.no_grad():
        lora_layers(model)[INSIDE[-1]].lora_B["default"][0, 0] = torch.inf
    refused(model, "finite weights", into="nf4")


def test_a_dense_sum_that_its_dtype_cannot_hold_is_refused() -> None:
    model = a_model("dense")
    with torch.no_grad():
        lora_layers(model)[INSIDE[-1]].lora_B["default"][0, 0] = 1e6
    refused(model, f"merging {INSIDE[-1]} gives NaN or infinity in float16", dtype=torch.float16)


def test_a_4_bit_layer_of_which_only_the_bias_was_trained_keeps_its_codes() -> None:
    model = quantize_model(small_decoder(attention_bias=True))
    add_adapter(model, LoRAConfig(r=2, bias="all", target_modules=["q_proj"]))
    path = next(p for p, layer in lora_layers(model).items() if "default" not in layer.lora_A)
    before = lora_layers(model)[path].base_layer.quantized
    with torch.no_grad():
        lora_layers(model)[path].trained_bias["default"].fill_(2.0)
    report = merge_adapter(model, into="nf4")
    merged = model.get_submodule(path)
    assert all(torch.equal(merged.quantized.tensors()[key], tensor) for key, tensor in before.tensors().items())
    assert torch.equal(merged.bias, torch.full_like(merged.bias, 2.0))
    assert (report.weight_error[path], report.adapter_size[path]) == (0.0, 0.0)


def test_a_module_trained_whole_that_its_dtype_cannot_hold_is_refused() -> None:
    model = add_adapter(TinyModel(), LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "modules_to_save" in n and p.ndim == 2).fill_(1e6)
    refused(model, "merging lm_head gives NaN or infinity in float16", dtype=torch.float16)


def test_another_adapter_on_the_same_layers_is_refused() -> None:
    model = a_model("dense")
    add_adapter(model, LoRAConfig(target_modules=["up_proj"]), "second")
    refused(model, r"merging 'default' would lose \['second'\]", name="default")


def test_the_report_is_by_path() -> None:
    report = merge_adapter(a_model("nf4", torch.bfloat16))
    assert isinstance(report, MergeReport)
    assert list(report.weight_error) == list(report.originals) == INSIDE
    assert report.adapter == "default"
    assert all(0 < error < 1 for error in report.weight_error.values())
    sizes = {
        path: layer.scaling["default"] * layer.lora_B["default"] @ layer.lora_A["default"]
        for path, layer in report.originals.items()
    }
    assert report.adapter_size == pytest.approx(
        {path: float(delta.detach().norm()) for path, delta in sizes.items()}, rel=1e-5
    )
    errors = [report.weight_error[path] * report.adapter_size[path] for path in INSIDE]
    wanted = sum(e**2 for e in errors) / sum(size**2 for size in report.adapter_size.values())
    assert report.total_error == pytest.approx(wanted**0.5)
