"""kernels/linear_cross_entropy.py against float64 loops, forward and each gradient, and that it never holds (M, V)."""

import importlib

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import quant
from kernels import Head, LoRATerm, linear_cross_entropy, vocabulary_tiles
from tests import reference
from tests.accuracy import assert_as_accurate_as, exact, leaf
from tests.test_lora_matmul import plain_lora
from tests.test_matmul import saved_by

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
M, D, V, R = 24, 16, 41, 2  # enough numbers for two errors of the same size to measure the same within a factor of 2
TARGETS = [-100 if row % 5 == 1 else (row * 7) % V for row in range(M)]
HEADS = ["dense", "nf4", "dense+lora", "nf4+lora+bias"]


@pytest.fixture(params=["whole", "in parts"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with all rows and words at once, once with a few in each part and some left over."""
    if request.param == "in parts":
        in_parts(monkeypatch)


def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("kernels.linear_cross_entropy")  # the package has a function of that name
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 4 * V)
    monkeypatch.setattr(vocabulary_tiles, "ROWS", 11)
    monkeypatch.setattr(vocabulary_tiles, "TILE", 9)


def a_case(kind: str, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], quant.QuantizedTensor | None]:
    """Leaves by name, and the quantized weight where the head has one."""
    leaves = {"hidden": leaf(torch.randn(M, D).to(dtype))}
    weight = torch.randn(V, D)
    q = quant.quantize(weight, blocksize=32) if "nf4" in kind else None
    if q is None:
        leaves["weight"] = leaf(weight.to(dtype))
    if "lora" in kind:
        leaves |= {"A": leaf(torch.randn(R, D) / 4), "B": leaf(torch.randn(V, R) / 4)}
    if "bias" in kind:
        leaves["bias"] = leaf(torch.randn(V))
    return leaves, q


def head_of(leaves: dict[str, torch.Tensor], q: quant.QuantizedTensor | None) -> Head:
    adapters = (LoRATerm(leaves["A"], leaves["B"], 1.5),) if "A" in leaves else ()
    return Head(leaves["weight"] if q is None else q, adapters, leaves.get("bias"))


def plain_losses(leaves, q, targets, temperature, softcap):
    """The same math with every logit at once: (nll, entropy)."""
    head = head_of(leaves, q)
    dense = head.weight if q is None else quant.dequantize(q)
    z = plain_lora(leaves["hidden"], dense, head.adapters, head.bias, None).float()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / temperature
    logps = z.log_softmax(dim=1)
    return F.cross_entropy(z, targets, reduction="none"), -(logps.exp() * logps).sum(dim=1) * (targets != -100)


def by_loops(leaves, q, dnll, temperature, softcap):
    """(nll, entropy, gradient by name)."""
    dense = (leaves["weight"] if q is None else quant.dequantize(q)).tolist()
    hidden, ones = leaves["hidden"].tolist(), [1.0] * V
    bias = leaves["bias"].tolist() if "bias" in leaves else [0.0] * V
    terms = [reference.Term(leaves["A"].tolist(), leaves["B"].tolist(), 1.5, hidden)] if "A" in leaves else []
    logits = reference.lora_linear(hidden, dense, terms, bias, ones)
    losses = [
        reference.token_cross_entropy(z, t, temperature=temperature, softcap=softcap)
        for z, t in zip(logits, TARGETS, strict=True)
    ]
    dz = [[d * g for g in loss.gradient] for d, loss in zip(dnll, losses, strict=True)]
    g = reference.lora_linear_gradients(hidden, dense, terms, ones, dz)
    d_weight = reference.matmul_t(reference.transpose(dz), reference.transpose(hidden))
    gradients = {"hidden": exact(g.x), "weight": exact(d_weight), "bias": exact(g.bias)}
    for d_a, d_b, d_x in g.terms:
        gradients |= {"A": exact(d_a), "B": exact(d_b), "hidden": gradients["hidden"] + exact(d_x)}
    return exact([loss.nll for loss in losses]), exact([loss.entropy for loss in losses]), gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, None), (1.0, 2.0), (1.3, 5.0)])
@pytest.mark.usefixtures("nan_filled_empty", "chunks")
def test_value_entropy_and_every_gradient(kind: str, dtype: torch.dtype, temperature: float, softcap) -> None:
    ours, q = a_case(kind, dtype)
    plain = {name: leaf(tensor) for name, tensor in ours.items()}
    targets, dnll = torch.tensor(TARGETS), torch.randn(M)

    options = {"temperature": temperature, "softcap": softcap}
    nll, entropy = linear_cross_entropy(ours["hidden"], head_of(ours, q), targets, return_entropy=True, **options)
    nll.backward(dnll)
    plain_nll, plain_entropy = plain_losses(plain, q, targets, temperature, softcap)
    plain_nll.backward(dnll)

    expected_nll, expected_entropy, expected = by_loops(ours, q, dnll.tolist(), temperature, softcap)
    assert (nll.dtype, entropy.dtype) == (torch.float32, torch.float32)
    assert_as_accurate_as(plain_nll, nll, expected_nll)
    assert_as_accurate_as(plain_entropy, entropy, expected_entropy)
    for name in ours:
        assert ours[name].grad.dtype == ours[name].dtype, name
        assert_as_accurate_as(plain[name].grad, ours[name].grad, expected[name])


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.usefixtures("chunks")
def test_gradcheck(kind: str, softcap: float | None) -> None:
    leaves, q = a_case(kind, torch.float64)
    doubles = [leaf(tensor.double()) for tensor in leaves.values()]

    def function(*tensors):
        named = dict(zip(leaves, tensors, strict=True))
        return linear_cross_entropy(
            named["hidden"], head_of(named, q), torch.tensor(TARGETS), temperature=0.7, softcap=softcap
        )

    assert torch.autograd.gradcheck(function, doubles, fast_mode=True)


def test_a_bf16_weight_gradient_does_not_lose_what_each_chunk_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 chunks: a running total kept in bf16 would stop growing at about 256 times what a chunk adds."""
    in_parts(monkeypatch)
    hidden, targets = torch.rand(800, D).bfloat16(), torch.randint(V, (800,))
    ours = leaf(torch.randn(V, D).bfloat16())
    plain = leaf(ours)
    linear_cross_entropy(hidden, ours, targets).sum().backward()
    F.cross_entropy((hidden @ plain.T).float(), targets, reduction="sum").backward()
    double = leaf(ours.double())
    F.cross_entropy(hidden.double() @ double.T, targets, reduction="sum").backward()
    assert_as_accurate_as(plain.grad, ours.grad, double.grad)


@pytest.mark.usefixtures("chunks")
def test_ignored_rows_cost_nothing_and_what_they_hold_does_not_matter() -> None:
    targets = torch.tensor(TARGETS)
    ignored = targets == -100
    hidden, weight = torch.randn(M, D), leaf(torch.randn(V, D))
    hidden[ignored] = float("nan")
    hidden.requires_grad_()
    nll, entropy = linear_cross_entropy(hidden, weight, targets, return_entropy=True)
    assert nll[ignored].count_nonzero() == 0
    assert entropy[ignored].count_nonzero() == 0
    nll.sum().backward()
    assert torch.isfinite(nll).all()
    assert torch.isfinite(weight.grad).all()
    assert hidden.grad[ignored].abs().max() == 0
    assert hidden.grad[~ignored].abs().min() > 0


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("rows", [0, M])
def test_all_rows_ignored_or_none_given_is_zero_and_not_nan(kind: str, rows: int) -> None:
    leaves, q = a_case(kind, torch.float32)
    hidden = leaf(leaves["hidden"][:rows])
    targets = torch.full((rows,), -100)
    nll, entropy = linear_cross_entropy(hidden, head_of(leaves, q), targets, return_entropy=True)
    nll.sum().backward()
    assert nll.tolist() == [0.0] * rows
    assert entropy.tolist() == [0.0] * rows
    for name, tensor in (leaves | {"hidden": hidden}).items():
        assert tensor.grad is not None, name
        assert tensor.grad.count_nonzero() == 0, name


def test_ignore_index_may_be_a_token_of_the_vocabulary() -> None:
    hidden, weight = torch.randn(3, D), torch.randn(V, D)
    nll = linear_cross_entropy(hidden, weight, torch.tensor([5, 0, 5]), ignore_index=5)
    assert nll[[0, 2]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(nll[1], F.cross_entropy(hidden[1:2] @ weight.T, torch.tensor([0])))


def test_huge_logits_neither_overflow_nor_underflow() -> None:
    hidden, weight = leaf(torch.randn(4, D) * 1e4), torch.randn(V, D)
    targets = (hidden @ weight.T).argmin(dim=1)
    nll = linear_cross_entropy(hidden, weight, targets)
    nll.sum().backward()
    double = hidden.detach().double() @ weight.T.double()
    torch.testing.assert_close(nll.double(), F.cross_entropy(double, targets, reduction="none"), rtol=1e-5, atol=0)
    assert torch.isfinite(hidden.grad).all()


def test_only_what_requires_a_gradient_gets_one() -> None:
    hidden, weight = leaf(torch.randn(M, D)), torch.randn(V, D)
    term = LoRATerm(torch.randn(R, D), leaf(torch.randn(V, R)), 1.0)
    linear_cross_entropy(hidden, Head(weight, (term,)), torch.tensor(TARGETS)).sum().backward()
    assert weight.grad is None
    assert term.A.grad is None
    assert term.B.grad.abs().sum() > 0
    alone, both = leaf(weight), leaf(weight)
    linear_cross_entropy(hidden.detach(), alone, torch.tensor(TARGETS)).sum().backward()
    linear_cross_entropy(hidden, both, torch.tensor(TARGETS)).sum().backward()
    assert torch.equal(alone.grad, both.grad)
    frozen = linear_cross_entropy(hidden.detach(), weight, torch.tensor(TARGETS))
    assert not frozen.requires_grad


class LargestTensor(TorchDispatchMode):
    """The most elements that any one result of an operation has, while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("kind", ["frozen", "nf4", "trained"])
def test_no_tensor_of_all_tokens_by_the_vocabulary_ever_exists(kind: str) -> None:
    """With the vocabulary of SmolLM2 and the chunk size as it is shipped; a frozen head's backward has no logits."""
    tokens, width, vocabulary = 512, 4, 49_152
    weight = torch.randn(vocabulary, width, requires_grad=kind == "trained")
    head = quant.quantize(weight) if kind == "nf4" else weight
    hidden, targets = leaf(torch.randn(tokens, width)), torch.randint(vocabulary, (tokens,))
    with LargestTensor() as forward:
        nll, saved = saved_by(lambda: linear_cross_entropy(hidden, head, targets))
    with LargestTensor() as backward:
        nll.sum().backward()
    assert vocabulary < forward.numel < tokens * vocabulary / 2
    if kind == "trained":
        assert vocabulary < backward.numel < tokens * vocabulary / 2
    else:
        assert backward.numel == tokens * width
    assert max(t.numel() for t in saved) <= vocabulary * width


def test_the_probe_above_does_see_the_logits() -> None:
    with LargestTensor() as largest:
        F.cross_entropy(torch.randn(40, 4) @ torch.randn(4, 500), torch.zeros(40, dtype=torch.long))
    assert largest.numel >= 40 * 500


@pytest.mark.parametrize("targets", [[0, V], [-1, 0]], ids=["too large", "negative"])
def test_a_target_outside_the_vocabulary_is_refused(targets: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"targets must lie in \[0, {V}\) or be -100"):
        linear_cross_entropy(torch.randn(2, D), torch.randn(V, D), torch.tensor(targets))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        linear_cross_entropy(torch.randn(1, D), torch.randn(V, D), torch.tensor([0]), temperature=temperature)


@pytest.mark.parametrize("softcap", [0.0, -2.0])
def test_a_softcap_that_is_not_positive_is_refused(softcap: float) -> None:
    with pytest.raises(ValueError, match="softcap must be positive"):
        linear_cross_entropy(torch.randn(1, D), torch.randn(V, D), torch.tensor([0]), softcap=softcap)


@pytest.mark.parametrize(
    ("hidden", "targets"),
    [((2, D + 1), 2), ((2, D), 3), ((1, 2, D), 2)],
    ids=["width", "rows", "batch"],
)
def test_shapes_that_do_not_fit_are_refused(hidden: tuple[int, ...], targets: int) -> None:
    with pytest.raises(ValueError, match=rf"hidden \(M, {D}\) and targets \(M,\)"):
        linear_cross_entropy(torch.randn(hidden), torch.randn(V, D), torch.zeros(targets, dtype=torch.long))


def test_a_term_with_its_own_x_is_refused() -> None:
    hidden = leaf(torch.randn(M, D))
    term = LoRATerm(leaf(torch.randn(R, D)), leaf(torch.randn(V, R)), 1.0, hidden.detach() * 2)
    with pytest.raises(ValueError, match="own x"):
        linear_cross_entropy(hidden, Head(torch.randn(V, D), (term,)), torch.arange(M))


def test_it_is_the_composition_of_its_parts() -> None:
    hidden, q = torch.randn(M, D), quant.quantize(torch.randn(V, D))
    logits = kernels.matmul(hidden, q)
    nll = linear_cross_entropy(hidden, q, torch.arange(M))
    torch.testing.assert_close(nll, F.cross_entropy(logits, torch.arange(M), reduction="none"))
