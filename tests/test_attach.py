"""lora/attach.py: which layers are replaced, what is frozen, what is counted, and that training moves only adapters."""

import copy

import pytest
import torch
from torch import Tensor, nn

import quant
from lora import (
    LinearNF4,
    LoRAConfig,
    LoRALinear,
    add_adapter,
    count_parameters,
    disabled_adapters,
    quantize_model,
    trainable_parameters,
)
from lora.adapters import lora_layers

D, INNER, VOCAB, LAYERS = 8, 12, 11, 2
PROJECTIONS = {
    "self_attn.q_proj": (D, D),
    "self_attn.v_proj": (4, D),
    "mlp.up_proj": (INNER, D),
    "mlp.down_proj": (D, INNER),
}


class Block(nn.Module):
    """Not a transformer, but its names and its nesting."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for path, (n, k) in PROJECTIONS.items():
            parent, _, name = path.partition(".")
            setattr(getattr(self, parent), name, nn.Linear(k, n, bias=bias))
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.self_attn.q_proj(h) * self.self_attn.v_proj(h).repeat(1, 2)
        return x + self.mlp.down_proj(torch.tanh(self.mlp.up_proj(x)))


class TinyModel(nn.Module):
    """Ids (M,) → logits (M, VOCAB)."""

    def __init__(self, bias: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCAB, D)
        self.model.layers = nn.ModuleList(Block(bias) for _ in range(LAYERS))
        self.lm_head = nn.Linear(D, VOCAB, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x)
        return self.lm_head(x)


IDS = torch.arange(VOCAB)
INSIDE = [f"model.layers.{i}.{path}" for i in range(LAYERS) for path in PROJECTIONS]


def randomize_b(model: nn.Module) -> None:
    """Adapters as training leaves them: B is no longer zero."""
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for B in layer.lora_B.values():
                B.normal_()


def paths_of(model: nn.Module, kind: type) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, kind)]


# quantize_model


def test_quantize_model_replaces_every_linear_layer_but_the_head() -> None:
    model = TinyModel(bias=True)
    before = copy.deepcopy(model)
    assert quantize_model(model) is model
    assert paths_of(model, LinearNF4) == INSIDE
    assert paths_of(model, nn.Linear) == ["lm_head"]
    for path in INSIDE:
        ours, dense = model.get_submodule(path), before.get_submodule(path)
        assert torch.equal(quant.dequantize(ours.quantized), quant.dequantize(quant.quantize(dense.weight)))
        assert torch.equal(ours.bias, dense.bias)


def test_quantize_model_skips_by_last_part_and_by_path_and_passes_its_options_on() -> None:
    model = quantize_model(TinyModel(), quant_type="fp4", blocksize=32, double_quant=False, skip=("up_proj", INSIDE[0]))
    chosen = [path for path in INSIDE if "up_proj" not in path and path != INSIDE[0]]
    assert paths_of(model, LinearNF4) == [*chosen, "lm_head"]
    q = model.lm_head.quantized
    assert (q.quant_type, q.blocksize, q.double_quant) == ("fp4", 32, False)


def test_quantizing_twice_changes_nothing() -> None:
    model = quantize_model(TinyModel())
    packed = [model.get_submodule(path).packed for path in INSIDE]
    quantize_model(model)
    assert all(model.get_submodule(path).packed is p for path, p in zip(INSIDE, packed, strict=True))


# add_adapter: targets


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, INSIDE),
        ({"target_modules": ["q_proj", "lm_head"]}, [p for p in INSIDE if "q_proj" in p] + ["lm_head"]),
        ({"target_modules": r".*\.1\..*_proj"}, [p for p in INSIDE if ".1." in p]),
        ({"exclude_modules": ["mlp.up_proj"]}, [p for p in INSIDE if "up_proj" not in p]),
        ({"layers_to_transform": [1]}, [p for p in INSIDE if ".1." in p]),
        ({"target_modules": [INSIDE[2]]}, [INSIDE[2]]),
    ],
)
def test_the_targets_are_wrapped_and_nothing_else(quantized: bool, options: dict, chosen: list[str]) -> None:
    model = TinyModel()
    if quantized:
        quantize_model(model)
    assert add_adapter(model, LoRAConfig(r=2, **options)) is model
    assert paths_of(model, LoRALinear) == chosen


def test_each_layer_gets_the_rank_and_scaling_of_its_path() -> None:
    config = LoRAConfig(r=2, alpha=8, rank_pattern={"q_proj": 3}, alpha_pattern={"up_proj": 1})
    model = add_adapter(TinyModel(), config)
    for path, layer in lora_layers(model).items():
        r = 3 if "q_proj" in path else 2
        assert layer.lora_A["default"].shape == (r, layer.in_features)
        assert layer.lora_B["default"].shape == (layer.out_features, r)
        assert layer.scaling["default"] == (1 if "up_proj" in path else 8) / r


def test_a_second_adapter_sits_on_the_same_wrapper_and_may_have_other_targets() -> None:
    model = add_adapter(TinyModel(), LoRAConfig(target_modules=["q_proj"]), "first")
    wrappers = lora_layers(model)
    add_adapter(model, LoRAConfig(), "second")
    assert paths_of(model, LoRALinear) == INSIDE
    for path, layer in lora_layers(model).items():
        assert list(layer.lora_A) == (["first", "second"] if "q_proj" in path else ["second"])
        assert path not in wrappers or layer is wrappers[path]


@pytest.mark.parametrize("training", [True, False])
def test_a_wrapper_is_in_the_mode_of_the_model(training: bool) -> None:
    model = add_adapter(TinyModel().train(training), LoRAConfig())
    assert all(module.training is training for module in model.modules())


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_a_new_adapter_changes_no_logit(quantized: bool) -> None:
    model = TinyModel()
    if quantized:
        quantize_model(model)
    before = model(IDS)
    assert torch.equal(add_adapter(model, LoRAConfig())(IDS), before)


# add_adapter: refusals


def refused(model: nn.Module, config: LoRAConfig, name: str, message: str) -> None:
    before = {path: type(module) for path, module in model.named_modules()}
    wanted = {path for path, _ in trainable_parameters(model)}
    with pytest.raises(ValueError, match=message):
        add_adapter(model, config, name)
    assert {path: type(module) for path, module in model.named_modules()} == before
    assert {path for path, _ in trainable_parameters(model)} == wanted


def test_targets_that_match_no_linear_layer_are_refused_and_the_names_shown() -> None:
    known = r"\['down_proj', 'lm_head', 'q_proj', 'up_proj', 'v_proj'\]"
    refused(
        TinyModel(), LoRAConfig(target_modules=["qq_proj"]), "default", rf"qq_proj.* match no linear layer.*{known}"
    )


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "norm"], r"model.layers.0.norm \(LayerNorm\): only linear"),
        (r".*mlp.*", r"model.layers.0.mlp \(Module\): only linear"),
    ],
)
@pytest.mark.parametrize("already", [False, True])
def test_a_target_that_is_not_linear_is_refused(targets: list[str] | str, message: str, already: bool) -> None:
    model = add_adapter(TinyModel(), LoRAConfig(), "first") if already else TinyModel()
    refused(model, LoRAConfig(target_modules=targets), "default", message)


def test_what_an_adapter_is_made_of_is_no_target() -> None:
    """The regex matches q_proj and also q_proj.lora_A, which the first adapter put there."""
    model = add_adapter(TinyModel(), LoRAConfig(), "first")
    add_adapter(model, LoRAConfig(target_modules=r".*q_proj.*"), "second")
    assert [path for path, layer in lora_layers(model).items() if "second" in layer.lora_A] == [INSIDE[0], INSIDE[4]]


def test_a_name_that_is_taken_is_refused() -> None:
    model = add_adapter(TinyModel(), LoRAConfig(), "sft")
    refused(model, LoRAConfig(), "sft", "'sft' is on this model already")


@pytest.mark.parametrize("name", ["", "a.b", "1st", "two words", "keys", "training"])
def test_a_name_that_cannot_be_one_is_refused(name: str) -> None:
    refused(TinyModel(), LoRAConfig(), name, "name must be letters, digits and _")


# Freezing and counting


def test_everything_but_the_adapter_is_frozen() -> None:
    for model in (TinyModel(bias=True), quantize_model(TinyModel(bias=True))):
        add_adapter(model, LoRAConfig(target_modules=["q_proj"]))
        names = [name for name, _ in trainable_parameters(model)]
        assert names == [f"{p}.lora_{half}.default" for p in (INSIDE[0], INSIDE[4]) for half in "AB"]
        assert all(p.requires_grad for _, p in trainable_parameters(model))


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_counts_are_those_of_the_shapes(quantized: bool, double_quant: bool, bias: bool, tied: bool) -> None:
    model, r = TinyModel(bias, tied), 3
    if quantized:
        quantize_model(model, double_quant=double_quant)
    dense = LAYERS * (sum(n * k + n * bias for n, k in PROJECTIONS.values()) + 2 * D) + VOCAB * D * (1 if tied else 2)
    assert count_parameters(model)[1] == dense
    add_adapter(model, LoRAConfig(r=r))
    low_rank = LAYERS * sum(r * (n + k) for n, k in PROJECTIONS.values())
    assert count_parameters(model) == (low_rank, dense + low_rank)
    assert sum(p.numel() for _, p in trainable_parameters(model)) == low_rank


def test_without_an_adapter_a_dense_model_trains_whole() -> None:
    model = TinyModel()
    trainable, total = count_parameters(model)
    assert trainable == total == sum(p.numel() for p in model.parameters())


# Training


def base_bytes(model: nn.Module) -> dict[str, bytes]:
    """Everything that belongs to the base: parameters and buffers, the ones outside the state dict too."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {
        name: t.detach().clone().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, t in tensors.items()
        if "lora_" not in name
    }


@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "qlora"])
def test_training_moves_every_adapter_and_not_one_byte_of_the_base(quantized: bool) -> None:
    model = TinyModel(bias=True)
    if quantized:
        quantize_model(model)
    add_adapter(model, LoRAConfig(r=2, dropout=0.1))
    before = base_bytes(model)
    adapters = {name: p.detach().clone() for name, p in trainable_parameters(model)}
    # every parameter goes to the optimizer, with decay: what must not move is frozen, not merely left out
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    losses = []
    for _ in range(6):
        loss = nn.functional.cross_entropy(model(IDS), IDS.flip(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert base_bytes(model) == before
    assert len(before) == len([n for n, _ in [*model.named_parameters(), *model.named_buffers()] if "lora_" not in n])
    for name, p in trainable_parameters(model):
        assert not torch.equal(p, adapters[name]), name
    assert losses[-1] < losses[0]
    with disabled_adapters(model):
        untouched = model(IDS)
    assert not torch.equal(model(IDS), untouched)


def test_a_deep_copy_has_adapters_and_a_state_of_its_own() -> None:
    model = add_adapter(quantize_model(TinyModel()), LoRAConfig(r=2))
    randomize_b(model)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS), model(IDS))
    assert twin.adapter_state is not model.adapter_state
    assert all(layer.state is twin.adapter_state for layer in lora_layers(twin).values())
    with disabled_adapters(twin):
        assert not torch.equal(twin(IDS), model(IDS))
