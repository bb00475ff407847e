"""kernels/dispatch.py: who is asked, who may fall back, and that backward runs where forward ran."""

import importlib
import threading

import pytest
import torch

import kernels
import quant
from kernels import Head, LoRATerm, captured_backend, describe_backends, dispatch, use_backend
from tests.accuracy import leaf

CPU = torch.device("cpu")
matmul_module = importlib.import_module("kernels.matmul")


@pytest.fixture(autouse=True)
def no_backend_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QLORA_BACKEND", raising=False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A pretended triton backend that serves every operation by the reference, and notes which ones it served."""
    noted: list[str] = []
    for operation, backend in list(dispatch._implementations):
        if backend == "reference":
            function = dispatch._implementations[operation, backend]

            def noting(*args, operation=operation, function=function, **kwargs):
                noted.append(operation)
                return function(*args, **kwargs)

            monkeypatch.setitem(dispatch._implementations, (operation, "triton"), noting)
    return noted


def test_auto_serves_a_cpu_tensor_and_is_the_default() -> None:
    assert dispatch.asked_backend() == "auto"
    q = quant.quantize(torch.randn(4, 8))
    assert torch.equal(kernels.dequantize(q), quant.dequantize(q))


def test_use_backend_holds_inside_and_not_after() -> None:
    with use_backend("reference"):
        assert dispatch.asked_backend() == "reference"
        with use_backend("auto"):
            assert dispatch.asked_backend() == "auto"
        assert dispatch.asked_backend() == "reference"
    assert dispatch.asked_backend() == "auto"


def test_use_backend_is_undone_by_an_error() -> None:
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        _ = 1 / 0
    assert dispatch.asked_backend() == "auto"


def test_use_backend_does_not_reach_other_threads() -> None:
    seen: list[str] = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.asked_backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_the_environment_asks_and_use_backend_overrules_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_BACKEND", "triton")
    assert dispatch.asked_backend() == "triton"
    with use_backend("reference"):
        assert dispatch.asked_backend() == "reference"


def test_an_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="one of reference, triton, cpu, auto, got 'cuda'"), use_backend("cuda"):
        pass
    monkeypatch.setenv("QLORA_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"QLORA_BACKEND.*got 'cuda'"):
        kernels.quantize(torch.randn(8))


def every_operation():
    q, x = quant.quantize(torch.randn(6, 8)), torch.randn(3, 8)
    term = LoRATerm(torch.randn(2, 8), torch.randn(6, 2), 1.0)
    return {
        "quantize": lambda: kernels.quantize(torch.randn(8)),
        "dequantize": lambda: kernels.dequantize(q),
        "matmul": lambda: kernels.matmul(x, q),
        "lora_matmul": lambda: kernels.lora_matmul(x, q, [term]),
        "linear_cross_entropy": lambda: kernels.linear_cross_entropy(x, q, torch.tensor([0, 1, 2])),
    }


@pytest.mark.parametrize("operation", list(every_operation()))
def test_a_backend_asked_for_by_name_never_falls_back(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(dispatch._implementations, (operation, "triton"), raising=False)
    with use_backend("triton"), pytest.raises(ValueError, match=f"'triton' was asked for and cannot run {operation}"):
        every_operation()[operation]()
    monkeypatch.setenv("QLORA_BACKEND", "triton")
    with pytest.raises(ValueError, match=f"'triton' was asked for and cannot run {operation}"):
        every_operation()[operation]()


@pytest.mark.parametrize("operation", list(every_operation()))
def test_a_backend_asked_for_by_name_is_the_one_that_runs(operation: str, calls: list[str]) -> None:
    every_operation()[operation]()
    assert calls == [], "auto does not send a CPU tensor to triton"
    with use_backend("triton"):
        every_operation()[operation]()
    assert calls[0] == operation


def test_auto_prefers_the_kernel_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._implementations, ("pretended", "reference"), lambda: None)
    assert dispatch.backend_for("pretended", CPU) == "reference"
    assert dispatch.backend_for("pretended", torch.device("cuda")) == "reference"
    for backend in ("cpu", "triton"):
        monkeypatch.setitem(dispatch._implementations, ("pretended", backend), lambda: None)
    assert dispatch.backend_for("pretended", CPU) == "cpu"
    assert dispatch.backend_for("pretended", torch.device("cuda")) == "triton"


def differentiable_operations():
    """Each returns something to call backward on, and needs the quantized weight again to do so."""
    q, x = quant.quantize(torch.randn(6, 8)), leaf(torch.randn(3, 8))
    term = LoRATerm(leaf(torch.randn(2, 8)), leaf(torch.randn(6, 2)), 1.0)
    return {
        "matmul": lambda: kernels.matmul(x, q),
        "lora_matmul": lambda: kernels.lora_matmul(x, q, [term]),
        "linear_cross_entropy": lambda: kernels.linear_cross_entropy(x, Head(q, (term,)), torch.tensor([0, 1, 2])),
    }


@pytest.mark.parametrize("operation", list(differentiable_operations()))
def test_backward_runs_on_the_backend_of_forward(operation: str, calls: list[str]) -> None:
    with use_backend("triton"):
        y = differentiable_operations()[operation]()
    calls.clear()
    with use_backend("reference"):
        y.sum().backward()
    assert "dequantize" in calls, "what backward calls runs there too"
    assert ("matmul_dx" in calls) == (operation == "matmul"), "the products with low-rank terms are no operation"


@pytest.mark.parametrize("operation", list(differentiable_operations()))
def test_backward_does_not_follow_a_later_choice(operation: str, calls: list[str]) -> None:
    with use_backend("reference"):
        y = differentiable_operations()[operation]()
    with use_backend("triton"):
        y.sum().backward()
    assert calls == []


def test_captured_backend_is_entered_again_later() -> None:
    with use_backend("reference"):
        again = captured_backend()
    assert dispatch.asked_backend() == "auto"
    for _ in range(2):
        with again():
            assert dispatch.asked_backend() == "reference"
    assert dispatch.asked_backend() == "auto"


def test_a_checkpoint_recomputes_on_the_backend_of_forward(calls: list[str]) -> None:
    q, x = quant.quantize(torch.randn(6, 8)), leaf(torch.randn(3, 8))

    def contexts():
        return use_backend(dispatch.asked_backend()), captured_backend()()

    with use_backend("triton"):
        y = torch.utils.checkpoint.checkpoint(
            lambda x: kernels.matmul(x, q).sin(), x, use_reentrant=False, context_fn=contexts
        )
    calls.clear()
    with use_backend("reference"):
        y.sum().backward()
    assert calls.count("matmul") == 1


def test_describe_backends_names_what_runs_and_why_the_rest_does_not() -> None:
    rows = describe_backends()
    assert set(rows) == {"reference", "triton", "cpu", "auto"}
    for operation in every_operation():
        assert operation in rows["reference"]
    for backend in ("triton", "cpu"):
        served = [op for op, b in dispatch._implementations if b == backend]
        assert served or "no" in rows[backend].split()
