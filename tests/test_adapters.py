"""lora/adapters.py: switching, sums, disabling, and the choice that recomputation in backward must use."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora import (
    LoRAConfig,
    add_adapter,
    captured_adapters,
    disabled_adapters,
    quantize_model,
    set_adapter,
    trainable_parameters,
)
from lora.adapters import lora_layers
from tests.test_attach import IDS, TinyModel, randomize_b

X = torch.linspace(-1, 1, 40).view(5, 8)


class Wrapped(nn.Module):
    """One linear layer: its adapters' sum can be written down."""

    def __init__(self, quantized: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 6)
        if quantized:
            quantize_model(self)
        for name, r in (("a", 2), ("b", 3)):
            add_adapter(self, LoRAConfig(r=r, alpha=5), name)
        randomize_b(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)

    def update(self, name: str, x: Tensor) -> Tensor:
        return self.fc.scaling[name] * x @ self.fc.lora_A[name].T @ self.fc.lora_B[name].T


def trainable(model: nn.Module) -> set[str]:
    """The adapters that are trained."""
    return {name.rsplit(".", 1)[-1] for name, _ in trainable_parameters(model)}


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_the_active_adapters_are_added_and_no_others(quantized: bool) -> None:
    model = Wrapped(quantized)
    base = model.fc.base_layer(X)
    for names in (("a",), ("b",), ("a", "b"), ()):
        set_adapter(model, names)
        torch.testing.assert_close(model(X), sum((model.update(n, X) for n in names), base))
        assert trainable(model) == set(names)


def test_the_last_added_adapter_is_active_and_a_single_name_switches() -> None:
    model = Wrapped()
    assert model.adapter_state.active == ("b",)
    set_adapter(model, "a")
    assert model.adapter_state.active == ("a",)
    assert trainable(model) == {"a"}


def test_only_active_adapters_get_a_gradient() -> None:
    model = Wrapped()
    set_adapter(model, "a")
    model(X).sum().backward()
    assert model.fc.lora_A["a"].grad.abs().sum() > 0
    assert model.fc.lora_A["b"].grad is None


def test_switching_back_gives_the_same_bits() -> None:
    model = Wrapped()
    b = model(X)
    set_adapter(model, "a")
    assert not torch.equal(model(X), b)
    set_adapter(model, "b")
    assert torch.equal(model(X), b)


def test_an_unknown_name_is_refused_and_changes_nothing() -> None:
    model = Wrapped()
    with pytest.raises(ValueError, match=r"no adapter is named 'c': the model has \['a', 'b'\]"):
        set_adapter(model, ["a", "c"])
    assert model.adapter_state.active == ("b",)
    assert trainable(model) == {"b"}


def test_a_model_without_adapters_says_so() -> None:
    with pytest.raises(ValueError, match="this model has no adapter: call add_adapter"):
        set_adapter(TinyModel(), "a")
    with pytest.raises(ValueError, match="this model has no adapter"), disabled_adapters(TinyModel()):
        pass


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_disabled_adapters_give_the_base_to_the_bit_and_come_back(quantized: bool) -> None:
    model = TinyModel()
    if quantized:
        quantize_model(model)
    base = model(IDS)
    add_adapter(model, LoRAConfig(r=2))
    randomize_b(model)
    adapted = model(IDS)
    assert not torch.equal(adapted, base)
    with disabled_adapters(model):
        assert torch.equal(model(IDS), base)
        with disabled_adapters(model):
            assert torch.equal(model(IDS), base)
        assert torch.equal(model(IDS), base)
    assert torch.equal(model(IDS), adapted)


def test_adapters_come_back_when_an_exception_leaves_the_context() -> None:
    model = Wrapped()
    adapted = model(X)
    with pytest.raises(RuntimeError, match="inside"), disabled_adapters(model):
        raise RuntimeError("inside")
    assert torch.equal(model(X), adapted)


def test_a_choice_made_while_disabled_holds_afterwards() -> None:
    model = Wrapped()
    with disabled_adapters(model):
        set_adapter(model, "a")
        assert torch.equal(model(X), model.fc.base_layer(X))
    torch.testing.assert_close(model(X), model.fc.base_layer(X) + model.update("a", X))


def test_disabling_leaves_what_is_trained_alone() -> None:
    model = Wrapped()
    with disabled_adapters(model):
        assert trainable(model) == {"b"}


# Recomputation


def test_captured_adapters_enter_the_choice_again_and_leave_the_present_one() -> None:
    model = Wrapped()
    set_adapter(model, "a")
    with_a = model(X)
    enter_again = captured_adapters(model)
    set_adapter(model, "b")
    with_b = model(X)
    with disabled_adapters(model):
        base = model(X)
        for _ in range(2):  # a retained graph recomputes twice
            with enter_again():
                assert torch.equal(model(X), with_a)
        assert torch.equal(model(X), base)
    assert torch.equal(model(X), with_b)
    with pytest.raises(RuntimeError, match="inside"), enter_again():
        raise RuntimeError("inside")
    assert torch.equal(model(X), with_b)


def test_captured_while_disabled() -> None:
    model = Wrapped()
    with disabled_adapters(model):
        enter_again = captured_adapters(model)
    with enter_again():
        assert torch.equal(model(X), model.fc.base_layer(X))


def test_captured_on_a_model_without_adapters() -> None:
    model = TinyModel()
    with captured_adapters(model)():
        assert model(IDS).shape == (len(IDS), len(IDS))


def gradients_with_checkpoint(model: Wrapped, after_forward) -> list[Tensor | None]:
    model.zero_grad()
    enter_again = captured_adapters(model)
    y = checkpoint(model, X, use_reentrant=False, context_fn=lambda: (nullcontext(), enter_again()))
    after_forward(model, y.pow(2).sum().backward)
    return [p.grad for p in model.fc.parameters()]


def backward_after_switching(model: Wrapped, backward) -> None:
    model.adapter_state.active = ("b",)  # without set_adapter: requires_grad stays as in the forward
    backward()


def backward_while_disabled(model: Wrapped, backward) -> None:
    with disabled_adapters(model):
        backward()


@pytest.mark.parametrize("after_forward", [backward_after_switching, backward_while_disabled])
def test_a_checkpoint_recomputes_with_the_adapters_of_its_forward(after_forward) -> None:
    """As DPO does: the reference pass, adapters off, comes between the policy's forward and its backward."""
    model = Wrapped()
    set_adapter(model, "a")
    model(X).pow(2).sum().backward()
    expected = [p.grad for p in model.fc.parameters()]
    found = gradients_with_checkpoint(model, after_forward)
    assert sum(gradient is not None for gradient in expected) == 2
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)


def test_each_wrapper_shares_the_models_state() -> None:
    model = add_adapter(TinyModel(), LoRAConfig())
    assert {id(layer.state) for layer in lora_layers(model).values()} == {id(model.adapter_state)}
