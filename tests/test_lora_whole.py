"""What an adapter has beside linear layers' A and B: embeddings, biases, whole modules. Values, training, files.

That all of it is PEFT's is checked in tests/peers/test_peft_whole.py.
"""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora import (
    LinearNF4,
    LoRAConfig,
    LoRAEmbedding,
    LoRALinear,
    SavedModule,
    add_adapter,
    captured_adapters,
    count_parameters,
    delete_adapter,
    disabled_adapters,
    load_adapter,
    merge_adapter,
    quantize_model,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unmerge_adapter,
)
from lora.adapters import AdapterState, adapter_layers
from lora.peft_format import CONFIG, WEIGHTS
from optim import decay_groups
from tests.accuracy import assert_as_accurate_as, leaf
from tests.test_attach import IDS, INSIDE, LAYERS, VOCAB, D, TinyModel, base_bytes

TIED = pytest.mark.filterwarnings("ignore:.*share one weight in this model")
WHOLE = LoRAConfig(
    r=2, target_modules=("q_proj", "embed_tokens"), bias="lora_only", modules_to_save=("lm_head", "1.norm")
)
BIASED = LoRAConfig(r=2, target_modules=("up_proj",), bias="all")


class Model(TinyModel):
    """With biases on linear layers, and none elsewhere. The same base each time."""

    def __init__(self, tied: bool = False, quantized: bool = False) -> None:
        torch.manual_seed(1)
        super().__init__(bias=True, tied=tied)
        for layer in self.model.layers:
            layer.norm = nn.LayerNorm(D, bias=False)
        if quantized:
            quantize_model(self)


def randomized(model: nn.Module) -> nn.Module:
    """Everything that is trained, as training leaves it."""
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


# The embedding layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("names", [("a",), ("a", "b")], ids=["one", "two"])
def test_an_embedding_s_value_and_every_gradient(dtype: torch.dtype, names: tuple[str, ...]) -> None:
    """In float64, token by token: h = W[id] + Σ s · B A[:, id]; ids come more than once."""
    base = nn.Embedding(7, 5, dtype=dtype).requires_grad_(False)
    layer = LoRAEmbedding(base, AdapterState(active=names))
    for i, name in enumerate(names):
        layer.add(name, LoRAConfig(r=3, alpha=6 + 3 * i), "embed_tokens")
        nn.init.normal_(layer.lora_embedding_A[name])
    ids, dy = torch.tensor([[3, 1, 3], [6, 0, 3]]), torch.randn(2, 3, 5).to(dtype)
    h = layer(ids)
    h.backward(dy)
    assert h.dtype == dtype

    def by_hand(wide: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        parts = [(leaf(layer.lora_embedding_A[n].to(wide)), leaf(layer.lora_embedding_B[n].to(wide))) for n in names]
        rows = [
            base.weight[i].to(wide) + sum(s * (B @ A[:, i]) for s, (A, B) in zip((2, 3), parts, strict=False))
            for i in ids.flatten()
        ]
        value = torch.stack(rows).view(2, 3, 5)
        value.backward(dy.to(wide))
        return value, [p.grad for pair in parts for p in pair]

    value, gradients = by_hand(torch.float64)
    plain, plain_gradients = by_hand(torch.float32)
    assert_as_accurate_as(plain.to(dtype), h, value)
    found = [p.grad for name in names for p in layer.parameters_of(name)]
    for mine, theirs, exact in zip(found, plain_gradients, gradients, strict=True):
        assert_as_accurate_as(theirs, mine, exact)


def test_an_embedding_starts_as_no_change_and_unseen_tokens_stay_so() -> None:
    model = Model()
    before = model(IDS)
    add_adapter(model, LoRAConfig(r=4, alpha=12, target_modules=["embed_tokens"]))
    layer = model.model.embed_tokens
    assert torch.equal(model(IDS), before)
    assert layer.scaling["default"] == 3
    assert layer.lora_embedding_A["default"].abs().max() == 0
    assert layer.lora_embedding_B["default"].std() > 0.5
    model(IDS[:3]).sum().backward()
    touched = layer.lora_embedding_A["default"].grad.abs().sum(dim=0) > 0
    assert touched.tolist() == [True] * 3 + [False] * (VOCAB - 3)


def test_the_padding_token_of_an_embedding_is_not_trained_and_stays_one() -> None:
    model = Model()
    model.model.embed_tokens = nn.Embedding(VOCAB, D, padding_idx=1)
    add_adapter(model, LoRAConfig(r=4, target_modules=["embed_tokens"]))
    model(IDS).sum().backward()
    touched = model.model.embed_tokens.lora_embedding_A["default"].grad.abs().sum(dim=0) > 0
    assert touched.tolist() == [True, False, *[True] * (VOCAB - 2)]
    merge_adapter(model)
    assert model.model.embed_tokens.padding_idx == 1


# What is trained


@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "qlora"])
@pytest.mark.parametrize("config", [WHOLE, BIASED], ids=["whole", "biased"])
def test_exactly_what_was_asked_for_is_trained_and_no_byte_of_the_base(config: LoRAConfig, quantized: bool) -> None:
    """Every parameter goes to the optimizer, with decay: what must not move is frozen, not merely left out."""
    model = add_adapter(Model(quantized=quantized), config)
    q_projs, linear = [p for p in INSIDE if "q_proj" in p], INSIDE
    if config is WHOLE:
        names = ["model.embed_tokens.lora_embedding_A.default", "model.embed_tokens.lora_embedding_B.default"]
        names += [f"{p}.{part}.default" for p in q_projs for part in ("lora_A", "lora_B", "trained_bias")]
        names += ["model.layers.1.norm.modules_to_save.default.weight", "lm_head.modules_to_save.default.weight"]
    else:
        names = [f"{p}.lora_{half}.default" for p in INSIDE if "up_proj" in p for half in "AB"]
        names += [f"{p}.trained_bias.default" for p in linear]
    trained = dict(trainable_parameters(model))
    assert sorted(trained) == sorted(names)
    before = {k: b for k, b in base_bytes(model).items() if k not in trained}
    starts = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(IDS), IDS.flip(0)).backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == set(names)
        optimizer.step()
    assert {k: b for k, b in base_bytes(model).items() if k not in trained} == before
    for name, parameter in trained.items():
        assert not torch.equal(parameter, starts[name]), name


def test_counts_and_weight_decay() -> None:
    """Matrices decay, whole ones too; biases and norms do not."""
    model = Model()
    total = count_parameters(model)[1]
    add_adapter(model, WHOLE)
    low_rank, biases, whole = 2 * (VOCAB + D) + LAYERS * 2 * (D + D), LAYERS * D, D + VOCAB * D
    assert count_parameters(model) == (low_rank + biases + whole, total + low_rank + biases + whole)
    matrices, vectors = decay_groups(trainable_parameters(model), 0.1)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert {tuple(p.shape) for p in vectors["params"]} == {(D,)}
    assert sum(p.numel() for p in matrices["params"]) == low_rank + VOCAB * D


def test_what_is_trained_is_in_fp32_over_a_bf16_base() -> None:
    model = add_adapter(Model().bfloat16(), WHOLE)
    assert {p.dtype for _, p in trainable_parameters(model)} == {torch.float32}
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.bfloat16
    x = torch.randn(3, D, dtype=torch.bfloat16)
    assert model.lm_head(x).dtype == model.model.layers[0].self_attn.q_proj(x).dtype == torch.bfloat16


# On, off, others


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=TIED)])
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_switched_off_the_base_is_there_to_the_bit(tied: bool, quantized: bool) -> None:
    model = Model(tied, quantized)
    base = model(IDS)
    assert torch.equal(add_adapter(model, WHOLE)(IDS), base)
    adapted = randomized(model)(IDS)
    assert not torch.equal(adapted, base)
    enter_again = captured_adapters(model)
    with disabled_adapters(model):
        assert torch.equal(model(IDS), base)
        with enter_again():
            assert torch.equal(model(IDS), adapted)
    assert torch.equal(model(IDS), adapted)


@pytest.mark.parametrize(
    ("tied_to", "config"),
    [
        ("lm_head", LoRAConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])),
        ("model.embed_tokens", LoRAConfig(target_modules=["embed_tokens"])),
        ("lm_head", LoRAConfig(target_modules=["lm_head"])),
        ("model.embed_tokens and lm_head", LoRAConfig(target_modules=["embed_tokens"], modules_to_save=["lm_head"])),
    ],
    ids=str,
)
def test_one_of_two_tied_layers_is_said_to_go_its_own_way(tied_to: str, config: LoRAConfig) -> None:
    model = Model(tied=True)
    with pytest.warns(UserWarning, match=f"embed_tokens and lm_head share one weight .* changes {tied_to}, each on"):
        add_adapter(model, config)
    base = model.model.embed_tokens
    assert (base if isinstance(base, nn.Embedding) else base.base_layer).weight.requires_grad is False
    head = model.lm_head
    original = getattr(head, "original_module", getattr(head, "base_layer", head))
    assert original.weight is base.weight


def test_adapters_side_by_side_each_with_its_own() -> None:
    """The logits of each alone are those it has on a model of its own."""
    alone = {}
    model = Model()
    for name, config in (("first", WHOLE), ("second", LoRAConfig(r=2, modules_to_save=("lm_head",), bias="all"))):
        single = Model()
        torch.manual_seed(5)
        alone[name] = randomized(add_adapter(single, config))(IDS)
        torch.manual_seed(5)
        randomized(add_adapter(model, config, name))
    for name in ("first", "second"):
        set_adapter(model, name)
        torch.testing.assert_close(model(IDS), alone[name])
        assert {
            n.split(".modules_to_save.")[-1].split(".")[0] for n, _ in trainable_parameters(model) if "lm_h" in n
        } == {name}
    with pytest.raises(ValueError, match=r"\['first', 'second'\] cannot be on together: each has .*q_proj trained"):
        set_adapter(model, ["first", "second"])
    assert model.adapter_state.active == ("second",)


def test_two_that_replace_nothing_of_the_other_add_up() -> None:
    model = randomized(add_adapter(Model(), LoRAConfig(r=2, target_modules=["q_proj"], bias="lora_only"), "biased"))
    randomized(add_adapter(model, LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), "whole"))
    set_adapter(model, ["biased", "whole"])
    q = model.model.layers[0].self_attn.q_proj
    assert q.bias is q.trained_bias["biased"]
    assert len(q.terms()) == 2
    assert model.lm_head.now is model.lm_head.modules_to_save["whole"]


def test_a_deleted_adapter_leaves_the_others_and_then_the_base() -> None:
    model = Model()
    base, modules = model(IDS), dict(model.named_modules())
    first = randomized(add_adapter(model, LoRAConfig(r=2, target_modules=["q_proj"]), "first"))(IDS)
    randomized(add_adapter(model, WHOLE, "second"))
    delete_adapter(model, "second")
    set_adapter(model, "first")
    assert torch.equal(model(IDS), first)
    assert [type(layer) for layer in adapter_layers(model).values()] == [LoRALinear, LoRALinear]
    delete_adapter(model, "first")
    assert torch.equal(model(IDS), base)
    assert dict(model.named_modules()).keys() == modules.keys()
    assert all(module is modules[path] for path, module in model.named_modules())
    with pytest.raises(ValueError, match="no adapter is named 'first'"):
        delete_adapter(model, "first")


# Refusals


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoRAConfig(modules_to_save=["lm_hed"]), "modules_to_save: no module's path ends in 'lm_hed'"),
        (LoRAConfig(modules_to_save=["up_proj"]), r"up_proj is in 4 bits, and what is trained whole must be dense"),
        (LoRAConfig(modules_to_save=["layers.0"]), r"model.layers.0 is in 4 bits"),
        (
            LoRAConfig(target_modules=["lm_head"], modules_to_save=["layers"]),
            r"model.layers is a ModuleList, which is not run as a module",
        ),
        (LoRAConfig(modules_to_save=["attn"]), r"self_attn would be trained whole, and has an adapter at .*q_proj"),
        (
            LoRAConfig(modules_to_save=["0.norm", "layers.0"]),
            r"model.layers.0 would be trained whole, and has an adapter at model.layers.0.norm: only one",
        ),
        (LoRAConfig(modules_to_save=["drop"]), r"drop \(Dropout\) has no parameters to train"),
        (LoRAConfig(bias="all"), r"would train model.extra.bias \(LayerNorm\): only linear layers' biases"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_trained_so_is_refused_and_the_model_left_as_it_was(config: LoRAConfig, message: str) -> None:
    model = Model(quantized=True)
    model.model.drop = nn.Dropout()
    if config.bias == "all":
        model.model.extra = nn.LayerNorm(D)
    before = [(path, id(module)) for path, module in model.named_modules()]
    wanted = {name for name, _ in trainable_parameters(model)}
    with pytest.raises(ValueError, match=message) as error:
        add_adapter(model, config)
    assert "\n" not in str(error.value)
    assert [(path, id(module)) for path, module in model.named_modules()] == before
    assert {name for name, _ in trainable_parameters(model)} == wanted


def test_a_module_has_low_rank_matrices_or_is_trained_whole_never_both() -> None:
    whole = add_adapter(Model(), LoRAConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "up_proj"]))
    with pytest.raises(ValueError, match=r"match lm_head \(trained whole by another adapter\)"):
        add_adapter(whole, LoRAConfig(target_modules=["lm_head"]), "second")
    with pytest.raises(ValueError, match=r"match model.layers.0.mlp.up_proj \(trained whole by another adapter\)"):
        add_adapter(whole, LoRAConfig(), "second")
    add_adapter(whole, LoRAConfig(target_modules=["v_proj"]), "second")
    low_rank = add_adapter(Model(), LoRAConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="modules_to_save: lm_head would be trained whole, and has an adapter at lm_"):
        add_adapter(low_rank, LoRAConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "second")


# Files


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("config", [WHOLE, BIASED], ids=["whole", "biased"])
def test_a_round_trip_gives_the_same_bits_and_bytes(config: LoRAConfig, quantized: bool, tmp_path: Path) -> None:
    model = randomized(add_adapter(Model(quantized=quantized), config, "mine"))
    save_adapter(model, tmp_path / "one", "mine")
    twin = load_adapter(Model(quantized=quantized), tmp_path / "one")
    assert trainable_parameters(twin) == []
    assert torch.equal(twin(IDS), model(IDS))
    save_adapter(twin, tmp_path / "two")
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
    again = load_adapter(Model(quantized=quantized), tmp_path / "one", trainable=True)
    names = [name.replace(".mine", ".default") for name, _ in trainable_parameters(model)]
    assert [name for name, _ in trainable_parameters(again)] == names


# Merging


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=TIED)])
def test_merged_logits_and_the_way_back(tied: bool) -> None:
    model = Model(tied)
    randomized(add_adapter(model, WHOLE))
    adapted = model(IDS)
    report = merge_adapter(model)
    assert not adapter_layers(model)
    torch.testing.assert_close(model(IDS), adapted)
    assert {type(model.get_submodule(path)) for path in report.originals} == {nn.Embedding, nn.Linear, nn.LayerNorm}
    assert all(error < 8 * torch.finfo(torch.float32).eps * 50 for error in report.weight_error.values())
    assert not any(p.requires_grad for path in report.originals for p in model.get_submodule(path).parameters())
    unmerge_adapter(model, report)
    assert torch.equal(model(IDS), adapted)


def test_merging_into_bf16_says_what_rounding_cost() -> None:
    """Of a module trained whole: ‖cast(W + Δ) - (W + Δ)‖ / ‖Δ‖, over all its parameters."""
    model = randomized(add_adapter(Model().bfloat16(), WHOLE))
    trained = model.lm_head.modules_to_save["default"].weight.detach().double()
    change = trained - model.lm_head.original_module.weight.double()
    report = merge_adapter(model)
    cost = (trained.bfloat16().double() - trained).norm() / change.norm()
    assert math.isclose(report.weight_error["lm_head"], cost, rel_tol=1e-6)
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.model.layers[0].self_attn.q_proj.bias.dtype == torch.bfloat16


def test_merged_into_4_bits_what_is_dense_stays_dense() -> None:
    model = randomized(add_adapter(Model(quantized=True), WHOLE))
    biases = [
        layer.trained_bias["default"] for layer in adapter_layers(model).values() if isinstance(layer, LoRALinear)
    ]
    report = merge_adapter(model, into="nf4")
    kinds = {path: type(model.get_submodule(path)) for path in report.originals}
    assert kinds["model.layers.0.self_attn.q_proj"] is LinearNF4
    assert {kind for path, kind in kinds.items() if "q_proj" not in path} == {nn.Embedding, nn.Linear, nn.LayerNorm}
    merged = [model.get_submodule(path).bias for path in report.originals if "q_proj" in path]
    assert all(torch.equal(mine, trained) for mine, trained in zip(merged, biases, strict=True))


def test_a_merge_that_would_lose_another_adapter_s_bias_is_refused() -> None:
    model = add_adapter(Model(), LoRAConfig(target_modules=["q_proj"]), "first")
    add_adapter(model, LoRAConfig(target_modules=["up_proj"], bias="all"), "second")
    with pytest.raises(ValueError, match=r"merging 'first' would lose \['second'\]"):
        merge_adapter(model, "first")


def test_a_saved_module_may_be_any_module() -> None:
    model = add_adapter(Model(), LoRAConfig(target_modules=["q_proj"], modules_to_save=["mlp"]))
    assert isinstance(model.model.layers[0].mlp, SavedModule)
