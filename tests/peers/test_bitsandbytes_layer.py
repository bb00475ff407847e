"""The QLoRA layer against bitsandbytes' Linear4bit under PEFT's LoRA, both fed the same 4-bit state.

bitsandbytes' CPU kernel reads the right scales only where no block crosses the end of a row, so K is a multiple of
the block size; and it stays in training mode, since in eval mode it may repack its weight for another kernel.
"""

import copy

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import Tensor, nn

from lora import AdapterState, LinearNF4, LoRAConfig, LoRALinear
from quant import dequantize, from_bnb_state_dict, to_bnb_state_dict
from tests.accuracy import assert_as_accurate_as, leaf

M, N, K, R = 7, 24, 128, 4
STATES = [
    {"quant_type": quant_type, "compress_statistics": double_quant}
    for quant_type in ("nf4", "fp4")
    for double_quant in (True, False)
]


def their_layer(dtype: torch.dtype, bias: bool, dropout: float, **state) -> peft.PeftModel:
    """A module whose `fc` is Linear4bit with LoRA around it, B no longer zero. Quantized when it is moved."""
    layer = bnb.nn.Linear4bit(K, N, bias=bias, compute_dtype=dtype, **state)
    layer.weight = bnb.nn.Params4bit(torch.randn(N, K, dtype=dtype), requires_grad=False, **state)
    if bias:
        layer.bias = nn.Parameter(torch.randn(N, dtype=dtype), requires_grad=False)
    model = nn.Module()
    model.fc = layer.to("cpu")
    config = peft.LoraConfig(r=R, lora_alpha=10, lora_dropout=dropout, use_rslora=True, target_modules=["fc"])
    wrapped = peft.get_peft_model(model, config).train()
    nn.init.normal_(lora_of(wrapped).lora_B["default"].weight)
    return wrapped


def lora_of(model: peft.PeftModel) -> nn.Module:
    return model.base_model.model.fc


def our_layer(theirs: nn.Module, dropout: float) -> LoRALinear:
    """The same state, read from its state dict, and the same A and B."""
    q = from_bnb_state_dict(theirs.base_layer.state_dict(), "weight")
    layer = LoRALinear(LinearNF4(q, theirs.base_layer.bias), AdapterState(active=("default",)))
    layer.add("default", LoRAConfig(r=R, alpha=10, dropout=dropout, use_rslora=True), "fc")
    with torch.no_grad():
        layer.lora_A["default"].copy_(theirs.lora_A["default"].weight)
        layer.lora_B["default"].copy_(theirs.lora_B["default"].weight)
    return layer.train()


def exact_layer(ours: LoRALinear) -> LoRALinear:
    """In float64, on the dequantized weight."""
    dense = nn.Linear(K, N, bias=ours.base_layer.bias is not None, dtype=torch.float64).requires_grad_(False)
    dense.weight.copy_(dequantize(ours.base_layer.quantized, torch.float64))
    if ours.base_layer.bias is not None:
        dense.bias.copy_(ours.base_layer.bias)
    layer = LoRALinear(dense, ours.state)
    layer.add("default", LoRAConfig(r=R, alpha=10, use_rslora=True), "fc")
    layer.lora_A.load_state_dict(ours.lora_A.state_dict())
    layer.lora_B.load_state_dict(ours.lora_B.state_dict())
    return layer.double()


def run(layer: nn.Module, A: Tensor, B: Tensor, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The value, and the gradients of x, A and B."""
    x = leaf(x)
    torch.manual_seed(11)
    y = layer(x)
    y.backward(dy.to(y.dtype))
    return {"y": y, "x": x.grad, "A": A.grad, "B": B.grad}


def run_both(dtype: torch.dtype, bias: bool, dropout: float, **state) -> tuple[dict[str, Tensor], ...]:
    model = their_layer(dtype, bias, dropout, **state)
    theirs, x, dy = lora_of(model), torch.randn(2, M, K).to(dtype), torch.randn(2, M, N).to(dtype)
    ours = our_layer(theirs, dropout)
    exact = exact_layer(ours)
    found = run(ours, ours.lora_A["default"], ours.lora_B["default"], x, dy)
    there = run(theirs, theirs.lora_A["default"].weight, theirs.lora_B["default"].weight, x, dy)
    wanted = run(exact, exact.lora_A["default"], exact.lora_B["default"], x.double(), dy.double())
    return found, there, wanted


@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_every_gradient_in_fp32(state: dict, bias: bool) -> None:
    found, there, wanted = run_both(torch.float32, bias, 0.0, **state)
    for name, exact in wanted.items():
        assert_as_accurate_as(there[name], found[name], exact)


@pytest.mark.parametrize("state", STATES, ids=str)
def test_value_and_every_gradient_in_bf16_under_their_autocast(state: dict) -> None:
    """How it is trained there: autocast runs A and B, which are fp32, in bf16. Here they are cast without it."""
    model = their_layer(torch.bfloat16, True, 0.0, **state)
    theirs, x, dy = lora_of(model), torch.randn(2, M, K).bfloat16(), torch.randn(2, M, N).bfloat16()
    ours = our_layer(theirs, 0.0)
    exact = exact_layer(ours)
    found = run(ours, ours.lora_A["default"], ours.lora_B["default"], x, dy)
    with torch.autocast("cpu", torch.bfloat16):
        there = run(theirs, theirs.lora_A["default"].weight, theirs.lora_B["default"].weight, x, dy)
    wanted = run(exact, exact.lora_A["default"], exact.lora_B["default"], x.double(), dy.double())
    for name in wanted:
        assert_as_accurate_as(there[name], found[name], wanted[name])


def test_equal_seeds_drop_the_same_inputs() -> None:
    """Other inputs dropped would be another result; the same ones, sums of at most K terms in another order."""
    found, there, _ = run_both(torch.float32, True, 0.5, **STATES[0])
    for name in found:
        difference = (found[name] - there[name]).norm()
        assert difference <= K * torch.finfo(torch.float32).eps * there[name].norm(), name


@pytest.mark.parametrize("state", STATES, ids=str)
def test_a_layer_goes_back_to_its_state_and_gives_the_same_value(state: dict) -> None:
    """Ours, after casts and a copy, written as its tensors and loaded by its class."""
    model = their_layer(torch.float32, False, 0.0, **state)
    ours = copy.deepcopy(our_layer(lora_of(model), 0.0).half()).base_layer
    tensors = to_bnb_state_dict(ours.quantized, "weight")
    weight = tensors.pop("weight")
    again = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=torch.float32, **state)
    again.weight = bnb.nn.Params4bit.from_prequantized(weight, tensors, device="cpu")
    x = torch.randn(M, K)
    assert torch.equal(again.train()(x), lora_of(model).base_layer(x))
