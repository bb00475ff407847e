"""kernels/linear_distill.py against distill_loss on all logits: values, each gradient, and that these never exist."""

import importlib
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import kernels
import quant
from benchmarks.bench_train_step import LiveBytes
from kernels import Head, LoRATerm, TopK, linear_distill, linear_top_k
from lora import LoRAConfig, add_adapter
from tests.accuracy import assert_as_accurate_as, leaf
from tests.small_llama import small_decoder
from tests.test_linear_cross_entropy import LargestTensor
from tests.test_lora_matmul import plain_lora
from tests.test_matmul import saved_by
from trainers.distill import distill_loss

M, D, WIDE, V, R = 48, 16, 20, 41, 2
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
MIXES = [(0.0, 1.0), (0.0, 0.7), (0.1, 1.3), (0.5, 1.0), (0.9, 0.7), (1.0, 1.0), (1.0, 2.0)]
"""beta, temperature"""
HEADS = ["dense", "frozen", "nf4", "dense+lora", "nf4+lora+bias"]
TEACHERS = ["dense", "nf4+lora", "top 5", "padded"]


@pytest.fixture
def five_rows_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("kernels.linear_cross_entropy"), "CHUNK_BYTES", 5 * 4 * 2 * V)


def student_of(kind: str) -> tuple[dict[str, torch.Tensor], Head]:
    """(leaves by name, the head made of them)."""
    leaves = {"hidden": leaf(torch.randn(M, D))}
    weight = torch.randn(V, D)
    held = quant.quantize(weight, blocksize=32) if "nf4" in kind else weight
    if "dense" in kind:
        leaves["weight"] = held = leaf(weight)
    terms = ()
    if "lora" in kind:
        leaves |= {"A": leaf(torch.randn(R, D) / 4), "B": leaf(torch.randn(V, R) / 4)}
        terms = (LoRATerm(leaves["A"], leaves["B"], 1.5),)
    if "bias" in kind:
        leaves["bias"] = leaf(torch.randn(V))
    return leaves, Head(held, terms, leaves.get("bias"))


def teacher_of(kind: str, temperature: float) -> tuple[torch.Tensor | TopK, Head | None, torch.Tensor | TopK]:
    """(teacher, its head, what distill_loss takes)."""
    hidden, weight = torch.randn(M, WIDE), torch.randn(V + 7 if kind == "padded" else V, WIDE)
    terms = (LoRATerm(torch.randn(R, WIDE), torch.randn(V, R), 0.5),) if "lora" in kind else ()
    head = Head(quant.quantize(weight, blocksize=32) if "nf4" in kind else weight, terms)
    logits = all_logits(hidden, head)[:, :V]
    if kind != "top 5":
        return hidden, head, logits
    top = linear_top_k(hidden, head, 5, temperature=temperature)
    return top, None, top


def all_logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    dense = head.weight if isinstance(head.weight, torch.Tensor) else quant.dequantize(head.weight)
    return plain_lora(hidden, dense, head.adapters, head.bias, None)


def doubled(head: Head, leaves: dict[str, torch.Tensor]) -> Head:
    """The head in float64, its tensors those of `leaves`."""
    dense = head.weight if isinstance(head.weight, torch.Tensor) else quant.dequantize(head.weight)
    terms = (LoRATerm(leaves["A"], leaves["B"], 1.5),) if "A" in leaves else ()
    return Head(leaves.get("weight", dense.double()), terms, leaves.get("bias"))


@pytest.mark.parametrize(("beta", "temperature"), MIXES)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("teacher_kind", TEACHERS)
@pytest.mark.usefixtures("nan_filled_empty", "five_rows_a_chunk")
def test_value_and_every_gradient(kind: str, teacher_kind: str, beta: float, temperature: float) -> None:
    """(1 - w) D + w nll with another w in each row, beside the same from all logits at once in fp32 and in float64."""
    ours, head = student_of(kind)
    teacher, teacher_head, given = teacher_of(teacher_kind, temperature)
    targets, w, dloss = torch.randint(V, (M,)), torch.rand(M), torch.randn(M)
    options = {"beta": beta, "temperature": temperature}

    out = linear_distill(ours["hidden"], head, teacher, teacher_head, targets=targets, ce_weight=w, **options)
    out.loss.backward(dloss)

    def whole(leaves: dict[str, torch.Tensor], head: Head, given) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        z = all_logits(leaves["hidden"], head)
        apart, nll = distill_loss(z, given, **options), F.cross_entropy(z, targets, reduction="none")
        loss = (1 - w) * apart + w * nll
        loss.backward(dloss.to(loss.dtype))
        return loss, apart, nll

    plain = {name: leaf(tensor) for name, tensor in ours.items()}
    double = {name: leaf(tensor.double()) for name, tensor in ours.items()}
    plain_head = doubled(head, plain)._replace(weight=plain.get("weight", doubled(head, plain).weight.float()))
    wide = TopK(given.ids, given.logps.double()) if isinstance(given, TopK) else given.double()
    in_fp32, in_fp64 = whole(plain, plain_head, given), whole(double, doubled(head, double), wide)
    for name, value in zip(out._fields, out, strict=True):
        at = out._fields.index(name)
        assert_as_accurate_as(in_fp32[at], value, in_fp64[at])
    assert not out.divergence.requires_grad
    assert not out.nll.requires_grad
    for name in ours:
        assert_as_accurate_as(plain[name].grad, ours[name].grad, double[name].grad)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.usefixtures("five_rows_a_chunk")
def test_bf16_states_and_heads(beta: float, trained: bool) -> None:
    """Logits are compared in fp32, gradients come in bf16, and chunks are summed in fp32."""
    hidden, weight = torch.randn(M, D).bfloat16(), torch.randn(V, D).bfloat16()
    states, head = torch.randn(M, WIDE).bfloat16(), torch.randn(V, WIDE).bfloat16()
    ours, plain, double = (
        [leaf(t.to(dtype)) for t in (hidden, weight)] for dtype in (hidden.dtype,) * 2 + (torch.double,)
    )
    student = ours[1] if trained else ours[1].detach()
    out = linear_distill(ours[0], student, states, head, targets=torch.arange(M) % V, beta=beta, ce_weight=0.3)
    out.loss.sum().backward()
    for x, w in (plain, double):
        z, u = x @ w.T, states.to(x.dtype) @ head.to(x.dtype).T
        loss = 0.7 * distill_loss(z, u, beta=beta) + 0.3 * F.cross_entropy(
            z.to(torch.promote_types(z.dtype, torch.float32)), torch.arange(M) % V, reduction="none"
        )
        loss.sum().backward()
    assert out.loss.dtype == torch.float32
    assert_as_accurate_as(plain[0].grad, ours[0].grad, double[0].grad)
    if trained:
        assert_as_accurate_as(plain[1].grad, ours[1].grad, double[1].grad)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("teacher_kind", ["dense", "top 5"])
@pytest.mark.usefixtures("five_rows_a_chunk")
def test_gradcheck(kind: str, teacher_kind: str) -> None:
    leaves, head = student_of(kind)
    teacher, teacher_head, _ = teacher_of(teacher_kind, 0.7)
    doubles = [leaf(tensor.double()) for tensor in leaves.values()]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        named = dict(zip(leaves, tensors, strict=True))
        terms = (LoRATerm(named["A"], named["B"], 1.5),) if "A" in named else ()
        now = Head(named.get("weight", head.weight), terms, named.get("bias"))
        options = {"targets": torch.arange(M) % V, "ce_weight": 0.25, "temperature": 0.7}
        return linear_distill(named["hidden"], now, teacher, teacher_head, **options).loss

    assert torch.autograd.gradcheck(function, doubles, fast_mode=True)


def test_ce_weight_one_is_cross_entropy_and_nothing_else() -> None:
    leaves, head = student_of("dense")
    same = {name: leaf(tensor) for name, tensor in leaves.items()}
    teacher, teacher_head, _ = teacher_of("dense", 1.0)
    targets = torch.randint(V, (M,))
    out = linear_distill(leaves["hidden"], head, teacher, teacher_head, targets=targets, ce_weight=1.0, temperature=2.0)
    out.loss.sum().backward()
    nll = kernels.linear_cross_entropy(same["hidden"], same["weight"], targets)
    nll.sum().backward()
    for a, b in ((out.loss, nll), (out.nll, nll), *((leaves[name].grad, same[name].grad) for name in leaves)):
        torch.testing.assert_close(a, b)
    assert out.divergence.min() > 0


def test_an_adapter_on_the_output_layer_of_a_decoder_learns() -> None:
    """Decoder.head() with LoRA on lm_head: the gradients of A, B and of the layers below are those of all logits."""
    student, teacher = small_decoder(), small_decoder(num_hidden_layers=1)
    add_adapter(student, LoRAConfig(r=2, target_modules=["lm_head", "down_proj"]))
    ids = torch.randint(96, (2, 9))
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.1 * torch.randn_like(p))
        theirs = teacher(ids, return_hidden=True).reshape(-1, 48)
    ours = student(ids, return_hidden=True).reshape(-1, 48)
    linear_distill(ours, student.head(), theirs, teacher.head(), beta=0.3).loss.mean().backward()
    found = {name: p.grad.clone() for name, p in trained.items()}
    student.zero_grad()
    distill_loss(student(ids).view(-1, 96), teacher(ids).view(-1, 96), beta=0.3).mean().backward()
    assert any("lm_head" in name for name in found)
    for name, p in trained.items():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)


def test_a_teacher_has_no_gradient_and_its_hidden_states_stay_what_they_are() -> None:
    leaves, head = student_of("dense")
    hidden, weight = leaf(torch.randn(M, WIDE)), leaf(torch.randn(V, WIDE))
    linear_distill(leaves["hidden"], head, hidden, weight).loss.sum().backward()
    assert hidden.grad is None
    assert weight.grad is None


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("teacher_kind", TEACHERS)
def test_no_rows_give_zeros_for_every_gradient(kind: str, teacher_kind: str) -> None:
    """A batch of which every token is masked."""
    leaves, head = student_of(kind)
    teacher, teacher_head, _ = teacher_of(teacher_kind, 1.0)
    none = TopK(teacher.ids[:0], teacher.logps[:0]) if isinstance(teacher, TopK) else teacher[:0]
    no_targets = torch.zeros(0, dtype=torch.int64)
    out = linear_distill(leaves["hidden"][:0], head, none, teacher_head, targets=no_targets, ce_weight=0.5)
    out.loss.sum().backward()
    assert out.loss.shape == (0,)
    for name, tensor in leaves.items():
        assert tensor.grad.count_nonzero() == 0, name


@pytest.mark.parametrize("beta", BETAS)
def test_huge_hidden_states_are_no_nan(beta: float) -> None:
    leaves, head = student_of("dense")
    teacher, teacher_head, _ = teacher_of("dense", 1.0)
    hidden = leaf(leaves["hidden"] * 1e4)
    out = linear_distill(
        hidden, head, -1e4 * teacher, teacher_head, targets=torch.arange(M) % V, beta=beta, ce_weight=0.5
    )
    out.loss.sum().backward()
    assert out.loss.isfinite().all()
    assert hidden.grad.isfinite().all()
    assert leaves["weight"].grad.isfinite().all()


@pytest.mark.parametrize("kind", ["frozen", "nf4", "trained"])
@pytest.mark.parametrize("teacher_kind", ["hidden states", "top k"])
def test_no_tensor_of_all_tokens_by_the_vocabulary_ever_exists(kind: str, teacher_kind: str) -> None:
    """The vocabulary of SmolLM2, chunks as shipped: the largest tensor is one chunk of one model's logits."""
    tokens, width, vocabulary = 512, 4, 49_152
    weight = torch.randn(vocabulary, width, requires_grad=kind == "trained")
    head = quant.quantize(weight) if kind == "nf4" else weight
    hidden, other = leaf(torch.randn(tokens, width)), torch.randn(tokens, width)
    teacher, teacher_head = other, torch.randn(vocabulary, width)
    with LargestTensor() as largest:
        if teacher_kind == "top k":
            teacher, teacher_head = linear_top_k(other, teacher_head, 8), None
        out, saved = saved_by(lambda: linear_distill(hidden, head, teacher, teacher_head))
        out.loss.sum().backward()
    assert vocabulary < largest.numel < tokens * vocabulary / 2
    assert max(t.numel() for t in saved) <= vocabulary * width


def live_beyond(given: tuple[torch.Tensor, ...], compute: Callable[[], torch.Tensor]) -> int:
    """Most bytes alive at once in `compute`, forward and backward, beside those of `given`."""
    with LiveBytes(list(given)) as live:
        before = live.now
        compute().sum().backward()
    return live.peak - before


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["frozen", "nf4", "trained"])
def test_bytes_alive_are_a_few_chunks_however_many_tokens_there_are(kind: str, beta: float, monkeypatch) -> None:
    """Counted over all tensors: never as much as a quarter of one model's logits, where all at once take two and more.

    Of 1024 tokens, one model's logits are 16 MB; a chunk of both models' is 256 KB, and the head 512 KB.
    """
    width, vocabulary, chunk = 32, 4096, 256 << 10
    monkeypatch.setattr(importlib.import_module("kernels.linear_cross_entropy"), "CHUNK_BYTES", chunk)
    weight, other_head = torch.randn(vocabulary, width, requires_grad=kind == "trained"), torch.randn(vocabulary, width)
    head = quant.quantize(weight) if kind == "nf4" else weight
    peaks, whole = [], 1024 * vocabulary * 4
    for tokens in (512, 1024):
        hidden, other = leaf(torch.randn(tokens, width)), torch.randn(tokens, width)
        given = (hidden, weight, other, other_head)
        ours = partial(linear_distill, hidden, head, other, other_head, beta=beta)
        peaks.append(live_beyond(given, lambda ours=ours: ours().loss))
    assert max(peaks) < whole / 4
    assert peaks[1] - peaks[0] < whole / 64, "twice the tokens, and hardly a byte more"
    assert live_beyond(given, lambda: distill_loss(hidden @ weight.T, other @ other_head.T, beta=beta)) > 2 * whole


@pytest.mark.usefixtures("five_rows_a_chunk")
def test_top_k_is_that_of_all_logits() -> None:
    hidden, weight = torch.randn(M, D), torch.randn(V, D)
    ids, logps = linear_top_k(hidden, weight, 6, temperature=0.7)
    assert (ids.dtype, logps.dtype) == (torch.int32, torch.float32)
    wanted, tokens = torch.topk(torch.log_softmax(hidden @ weight.T / 0.7, dim=1), 6)
    torch.testing.assert_close(logps, wanted)
    assert torch.equal(ids.long(), tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_hidden": torch.zeros(2, D + 1)}, rf"student_hidden \(M, {D}\), got \(2, {D + 1}\)"),
        ({"teacher": torch.zeros(3, WIDE)}, rf"the teacher's hidden states \(2, {WIDE}\), got \(3, {WIDE}\)"),
        ({"teacher_head": None}, "with a teacher_head, or TopK without one"),
        ({"teacher": TopK(torch.zeros(2, 3), torch.zeros(2, 3))}, "with a teacher_head, or TopK without one"),
        ({"targets": torch.tensor([0, V])}, rf"targets must lie in \[0, {V}\), got 0 … {V}"),
        ({"ce_weight": 0.5}, "a ce_weight above 0 needs targets"),
        ({"ce_weight": -0.5}, r"ce_weight must lie in \[0, 1\], got -0.5"),
        ({"beta": 2.0}, r"beta must lie in \[0, 1\]"),
        ({"temperature": -1.0}, "temperature must be positive"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict, message: str) -> None:
    call = {
        "student_hidden": torch.zeros(2, D),
        "student_head": torch.zeros(V, D),
        "teacher": torch.zeros(2, WIDE),
        "teacher_head": torch.zeros(V, WIDE),
    } | changes
    with pytest.raises(ValueError, match=message):
        linear_distill(**call)


def test_a_top_k_that_does_not_fit_is_refused() -> None:
    hidden, weight = torch.zeros(2, D), torch.zeros(V, D)
    with pytest.raises(ValueError, match=r"TopK needs ids and logps \(2, k\), got \(2, 3\) and \(2, 4\)"):
        linear_distill(hidden, weight, TopK(torch.zeros(2, 3), torch.zeros(2, 4)))
    with pytest.raises(ValueError, match=rf"the teacher's ids must lie in \[0, {V}\), got 0 … {V}"):
        linear_distill(hidden, weight, TopK(torch.tensor([[0], [V]]), torch.zeros(2, 1)))
    with pytest.raises(ValueError, match=f"k must lie between 1 and the vocabulary's {V}, got 0"):
        linear_top_k(hidden, weight, 0)


def test_a_head_with_dropout_is_refused() -> None:
    hidden = torch.randn(2, D)
    head = Head(torch.zeros(V, D), (LoRATerm(torch.zeros(R, D), torch.zeros(V, R), 1.0, hidden),))
    with pytest.raises(ValueError, match="own x"):
        linear_distill(hidden, head, hidden, torch.zeros(V, D))
