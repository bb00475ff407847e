"""optim/paged_adamw: torch.optim.AdamW's bits for every budget and page size; 8-bit state; state that survives."""

from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from kernels import use_backend
from kernels.adamw import dequantize_state
from optim import FolderTransport, PagedAdamW, SlowTransport
from tests import reference
from tests.accuracy import assert_as_accurate_as

SHAPES = [(30, 33), (3,), (40, 40), (), (1,), (5, 300), (257,), (0, 4)]
STATE_BYTES = 8 * sum(torch.Size(shape).numel() for shape in SHAPES)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def definition():
    with use_backend("reference"):
        yield


def parameters(shapes=SHAPES, dtype=torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def groups(tensors: list[nn.Parameter]) -> list[dict]:
    return [
        {"params": tensors[:3], "weight_decay": 0.1, "lr": 3e-3},
        {"params": tensors[3:], "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.0},
    ]


def train(optimizer: torch.optim.Optimizer, tensors: list[nn.Parameter], steps: range, scale=1.0) -> None:
    """The same gradients for the same step; parameter 2 has none in every third step, parameter 4 never any."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for i, tensor in enumerate(tensors):
            gradient = torch.randn(tensor.shape, generator=generator) * scale
            tensor.grad = None if i == 4 or (i == 2 and step % 3 == 0) else gradient.to(tensor.dtype)
        optimizer.param_groups[0]["lr"] *= 0.99
        optimizer.step()


def assert_same(ours: PagedAdamW, theirs: torch.optim.Optimizer, mine: list, others: list) -> None:
    assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))
    a, b = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert a.keys() == b.keys()
    for i in a:
        assert a[i].keys() == b[i].keys()
        for name in a[i]:
            assert torch.equal(a[i][name], b[i][name]), (i, name)
            assert a[i][name].dtype == b[i][name].dtype


@pytest.fixture(scope="module")
def torch_run():
    tensors = parameters()
    with use_backend("reference"):
        optimizer = torch.optim.AdamW(groups(tensors), foreach=False, fused=False)
        train(optimizer, tensors, range(100))
    return optimizer, tensors


EVERY_BUDGET = [(size, frames) for size in (4096, 9999) for frames in range(2 + STATE_BYTES // size)]


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize(("page_bytes", "frames"), [*EVERY_BUDGET, (4096, None)])
def test_a_hundred_steps_give_torchs_bits_for_every_budget(torch_run, frames, page_bytes, prefetch):
    """From nothing resident to all: pages of a size that divides no parameter's state, and one that nothing divides."""
    tensors = parameters()
    ours = PagedAdamW(
        groups(tensors), device_budget=None if frames is None else frames * page_bytes, page_bytes=page_bytes,
        prefetch=prefetch, transport=SlowTransport(),
    )  # fmt: skip
    train(ours, tensors, range(100))
    assert_same(ours, torch_run[0], tensors, torch_run[1])
    assert (ours.stats["page_outs"] == 0) == (ours.table.n_frames == len(ours.pages))
    ours.close()


def test_the_fused_step_is_as_accurate_as_torch():
    """Seven steps from one start: float64, torch in fp32, and the backend that a user gets."""
    runs = {}
    for name in ("exact", "plain", "ours"):
        tensors = parameters(dtype=torch.float64 if name == "exact" else torch.float32)
        make = PagedAdamW if name == "ours" else torch.optim.AdamW
        with use_backend("auto"):
            train(make(groups(tensors)), tensors, range(7))
        runs[name] = torch.cat([tensor.detach().flatten() for tensor in tensors])
    assert_as_accurate_as(runs["plain"], runs["ours"], runs["exact"])


def test_a_step_is_the_papers():
    (p,) = tensors = parameters([(4, 3)], torch.float64)
    options = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.2}
    optimizer = PagedAdamW(tensors, **options)
    state = reference.AdamWState(p.flatten().tolist(), [0.0] * 12, [0.0] * 12, 0)
    for _ in range(5):
        p.grad = torch.randn(4, 3, dtype=torch.float64)
        state = reference.adamw_step(state, p.grad.flatten().tolist(), **options)
        optimizer.step()
    wanted = torch.tensor(state.param, dtype=torch.float64)
    torch.testing.assert_close(p.detach().flatten(), wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_parameter_has_fp32_state_and_is_rounded_once(dtype):
    (mine,), (theirs,), (exact,) = (parameters([(40, 50)], d) for d in (dtype, dtype, torch.float64))
    exact.data.copy_(mine)
    optimizers = [PagedAdamW([mine], lr=0.1), torch.optim.AdamW([theirs], lr=0.1), torch.optim.AdamW([exact], lr=0.1)]
    for _ in range(5):
        gradient = torch.randn(40, 50).to(dtype)
        for tensor, optimizer in zip((mine, theirs, exact), optimizers, strict=True):
            tensor.grad = gradient.to(tensor.dtype)
            optimizer.step()
    assert_as_accurate_as(theirs, mine, exact.detach())
    assert optimizers[0].state_dict()["state"][0]["exp_avg"].dtype == torch.float32


def test_gradients_that_are_not_contiguous_count_as_well():
    mine, theirs = parameters([(30, 20)]), parameters([(30, 20)])
    for make, tensors in ((PagedAdamW, mine), (torch.optim.AdamW, theirs)):
        tensors[0].grad = torch.arange(600.0).view(20, 30).T
        make(tensors).step()
    assert torch.equal(mine[0], theirs[0])


# 8 bits


def small_step(state_bits: int, steps: int, **options) -> tuple[PagedAdamW, list[nn.Parameter]]:
    tensors = parameters([(96, 64), (4095,), (4096,), (300, 50)])
    optimizer = PagedAdamW(tensors, lr=1e-3, state_bits=state_bits, transport=SlowTransport(), **options)
    train(optimizer, tensors, range(steps), scale=0.01)
    return optimizer, tensors


def test_8bit_state_stays_within_bitsandbytes_tolerances_of_32_bits():
    """As its tests/test_optim.py does it: gradients of 0.01, and parameters that start each step from the same values.

    Mean error of p below 6e-5, below 6e-4 of p; fewer than 20 values of a moment off by more than 3e-3 + 1e-3 of it.
    """
    eight, exact = (parameters([(96, 64), (4095,), (4096,), (300, 50)]) for _ in range(2))
    optimizers = [PagedAdamW(eight, state_bits=8), torch.optim.AdamW(exact, foreach=False)]
    errors, relative = [], []
    for step in range(50):
        for optimizer, tensors in zip(optimizers, (eight, exact), strict=True):
            train(optimizer, tensors, range(step, step + 1), scale=0.01)
        assert torch.equal(eight[1], exact[1]), "fewer than 4096 elements keep 32 bits"
        for p, q in ((eight[0], exact[0]), (eight[2], exact[2]), (eight[3], exact[3])):
            error = (p - q).detach().abs()
            errors.append(error.mean().item())
            relative.append((error / (p.abs() + 1e-9)).mean().item())
            p.data.copy_(q.data)
    state, wanted = (optimizer.state_dict()["state"] for optimizer in optimizers)
    for i in (0, 2, 3):
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            codes, absmax = state[i][name].flatten(), state[i][f"{name}_absmax"]
            values, exactly = dequantize_state(codes, absmax, signed=signed), wanted[i][name].flatten()
            assert (~torch.isclose(values, exactly, atol=3e-3, rtol=1e-3)).sum() < 20
    assert 0 < sum(errors) / len(errors) < 6e-5
    assert sum(relative) / len(relative) < 6e-4


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("page_bytes", [4096, 9999, 10**6])
def test_8bit_state_gives_the_same_bits_for_every_budget(page_bytes, backend):
    with use_backend(backend):
        whole, wanted = small_step(8, 12)
        paged, found = small_step(8, 12, device_budget=0, page_bytes=page_bytes)
    assert_same(paged, whole, found, wanted)


def test_8bit_state_takes_a_quarter():
    optimizer, _ = small_step(8, 1)
    state = optimizer.state_dict()["state"]
    assert {name: (value.dtype, tuple(value.shape)) for name, value in state[3].items()} == {
        "step": (torch.float32, ()),
        "exp_avg": (torch.uint8, (300, 50)),
        "exp_avg_absmax": (torch.float32, (59,)),
        "exp_avg_sq": (torch.uint8, (300, 50)),
        "exp_avg_sq_absmax": (torch.float32, (59,)),
    }
    n = sum(tensor.numel() for i, tensor in enumerate(parameters([(96, 64), (4095,), (4096,), (300, 50)])) if i != 1)
    assert optimizer.stats["resident_bytes"] >= sum(page.used for page in optimizer.pages)
    assert sum(page.used for page in optimizer.pages) == pytest.approx(2 * n + 8 * n / 256 + 8 * 4095, rel=0.01)


# State that survives


@pytest.mark.parametrize("direction", ["to torch", "from torch"])
def test_the_state_dict_is_torchs(torch_run, direction):
    tensors = parameters()
    classes = [PagedAdamW, torch.optim.AdamW] if direction == "to torch" else [torch.optim.AdamW, PagedAdamW]
    first = classes[0](groups(tensors))
    train(first, tensors, range(40))
    second = classes[1](groups(tensors))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, tensors, range(40, 100))
    if isinstance(second, PagedAdamW):
        assert_same(second, torch_run[0], tensors, torch_run[1])
    else:
        assert all(torch.equal(a, b) for a, b in zip(tensors, torch_run[1], strict=True))


@pytest.mark.parametrize("state_bits", [32, 8])
def test_saved_state_resumes_paged_and_to_the_same_bits(tmp_path, state_bits):
    def make(tensors, **options):
        return PagedAdamW(groups(tensors), state_bits=state_bits, page_bytes=4096, **options)

    wanted = parameters()
    undisturbed = make(wanted)
    train(undisturbed, wanted, range(30))
    tensors = parameters()
    first = make(tensors, device_budget=0, spill=tmp_path / "spill")
    train(first, tensors, range(20))
    first.save_state(tmp_path / "state")
    assert first.stats["resident_bytes"] == 2 * 4096, "never all in memory"
    first.close()
    second = make(tensors, device_budget=9000, spill=tmp_path / "spill")
    second.param_groups[0]["lr"] = first.param_groups[0]["lr"]
    second.load_state(tmp_path / "state")
    assert second.stats["resident_bytes"] == 2 * 4096
    train(second, tensors, range(20, 30))
    assert_same(second, undisturbed, tensors, wanted)


def test_the_state_file_is_safetensors_with_the_state_dicts_names(tmp_path):
    tensors = parameters()
    optimizer = PagedAdamW(groups(tensors), device_budget=0, page_bytes=4096, transport=FolderTransport(tmp_path, CPU))
    train(optimizer, tensors, range(3))
    names = [f"layer.{i}" for i in range(len(tensors))]
    optimizer.save_state(tmp_path / "a", names)
    stored = safetensors.torch.load_file(tmp_path / "a" / "optimizer.safetensors")
    state = optimizer.state_dict()["state"]
    flat = {f"layer.{i}.{name}": value for i, fields in state.items() for name, value in fields.items()}
    assert stored.keys() == flat.keys()
    assert all(torch.equal(stored[name], flat[name]) for name in flat)


def saved(folder) -> PagedAdamW:
    tensors = parameters([(8, 8), (3,)])
    optimizer = PagedAdamW(tensors)
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    optimizer.save_state(folder)
    return optimizer


@pytest.mark.parametrize(
    ("shapes", "state_bits", "damage", "message"),
    [
        ([(8, 9), (3,)], 32, None, r"0.exp_avg must be F32 with shape \(8, 9\), found F32 \(8, 8\)"),
        ([(8, 8)], 32, None, "holds 1.exp_avg, which is no state of the parameters here"),
        ([(8, 8), (3,)], 32, lambda data: data[:-8], "optimizer.safetensors cannot be read"),
        ([(8, 8), (3,)], 32, lambda data: b"{}", "optimizer.safetensors cannot be read"),
        ([(8, 8), (3,)], 32, lambda data: data.replace(b'"1.step"', b'"1.stop"'), "holds 1.stop, which is no state"),
    ],
)
def test_a_state_file_that_does_not_fit_is_named(tmp_path, shapes, state_bits, damage, message):
    saved(tmp_path)
    path = tmp_path / "optimizer.safetensors"
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        PagedAdamW(parameters(shapes), state_bits=state_bits).load_state(tmp_path)


def test_a_missing_state_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"optimizer.safetensors cannot be read"):
        PagedAdamW(parameters([(3,)])).load_state(tmp_path)


def edited(state_dict: dict, **changes) -> dict:
    state_dict = copy.deepcopy(state_dict)
    state_dict["state"][0].update(changes)
    return state_dict


def test_a_state_dict_that_does_not_fit_is_refused(tmp_path):
    optimizer = saved(tmp_path)
    good = optimizer.state_dict()
    fresh = PagedAdamW(parameters([(8, 8), (3,)]))
    with pytest.raises(ValueError, match=r"parameter 0: exp_avg must be torch.float32 \(8, 8\), found .* \(2,\)"):
        fresh.load_state_dict(edited(good, exp_avg=torch.zeros(2)))
    with pytest.raises(ValueError, match=r"parameter 0: exp_avg_sq must be torch.float32 .* found None"):
        fresh.load_state_dict(edited(good, exp_avg_sq=None))
    with pytest.raises(ValueError, match="there is state for parameter 7 of 2"):
        fresh.load_state_dict({"state": {7: good["state"][0]}, "param_groups": good["param_groups"]})
    with pytest.raises(ValueError, match="made with amsgrad"):
        fresh.load_state_dict({"state": {}, "param_groups": [{"amsgrad": True}]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_bits": 4}, "state_bits must be 32 or 8, got 4"),
        ({"device_budget": -1}, "device_budget must be bytes, 'auto' or None: -1"),
        ({"device_budget": "all"}, "device_budget must be bytes, 'auto' or None: 'all'"),
        ({"lr": -1.0}, "lr is out of range: -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas is out of range: \(0.9, 1.0\)"),
        ({"weight_decay": -0.1}, "weight_decay is out of range"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PagedAdamW(parameters([(3,)]), **options)


def test_what_cannot_be_paged_is_refused():
    with pytest.raises(ValueError, match=r"parameter 0 \(3, 2\) must be contiguous"):
        PagedAdamW([nn.Parameter(torch.zeros(2, 3).T)])
    with pytest.raises(ValueError, match=r"must be real, got torch.complex64"):
        PagedAdamW([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    (p,) = tensors = parameters([(4, 4)])
    optimizer = PagedAdamW(tensors)
    p.grad = torch.ones(4, 4).to_sparse()
    with pytest.raises(ValueError, match="parameter 0 has a sparse gradient"):
        optimizer.step()
    with pytest.raises(ValueError, match="must be added before the first step"):
        optimizer.add_param_group({"params": parameters([(2,)])})


def test_spilling_cpu_memory_into_cpu_memory_says_that_it_frees_nothing(caplog):
    tensors = parameters()
    train(PagedAdamW(groups(tensors), device_budget=0, page_bytes=4096), tensors, range(1))
    assert "this frees nothing; name a folder" in caplog.text


def test_auto_is_a_budget():
    tensors = parameters()
    optimizer = PagedAdamW(groups(tensors), device_budget="auto", page_bytes=4096)
    train(optimizer, tensors, range(2))
    assert optimizer.stats["hits"] > 0
    assert isinstance(optimizer.state_dict()["state"][0]["exp_avg"], Tensor)
