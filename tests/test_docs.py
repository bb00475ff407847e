"""docs/ and the README tell the truth: the places and tests they name exist, links resolve, numbers are recomputed."""

from __future__ import annotations

import ast
import importlib
import json
import re
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import kernels
from lora import AdapterState, LoRAConfig, LoRALinear, add_adapter, count_parameters, save_adapter, trainable_parameters
from lora.attach import HEAD, linear_layers
from models import Decoder, DecoderConfig
from models.attention import apply_rope, llama3_factors, rope_frequencies, rope_tables
from models.config import RopeConfig
from models.decoder import RMSNorm
from models.gguf_checkpoint import GGUFCheckpoint
from models.sampling import candidates
from optim import SCHEDULES, decay_groups, learning_rate
from quant import dequantize, dynamic_map, nf4_codebook, quantize, to_bnb_state_dict
from quant.blockwise import unpack
from quant.double_quant import dequantize_absmax, quantize_absmax
from trainers.checkpoint import save_checkpoint
from trainers.run_folder import environment
from trainers.sft import sft_loss

ROOT = Path(__file__).resolve().parent.parent
EQUATIONS, FORMATS = ROOT / "docs" / "equations.md", ROOT / "docs" / "formats.md"
PAGES = sorted([*ROOT.glob("README.md"), *ROOT.glob("docs/*.md")])
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
WEIGHTS = torch.tensor([[0.5, -1.0, 0.1, 2.0], [0.0, -0.3, 1.3, -1.9]])
K_PROJ = "model.layers.0.self_attn.k_proj"


@lru_cache
def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def row(*cells: object) -> str:
    """A line of a table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def assert_holds(page: Path, *lines: str) -> None:
    """Each is a whole line of the page."""
    missing = [line for line in lines if line not in text(page).splitlines()]
    assert not missing, f"{page.name} must hold these lines, which the code gives: {missing}"


def assert_says(page: Path, *words: str) -> None:
    """Each stands somewhere in the page."""
    missing = [word for word in words if word not in text(page)]
    assert not missing, f"{page.name} must say, since the code gives: {missing}"


def tables(page: Path) -> list[list[list[str]]]:
    """Every table as rows of cells, the heading first."""
    found = re.findall(r"(?:^\|.*\|\n)+", text(page), re.MULTILINE)
    return [[line.strip("| ").split(" | ") for line in table.splitlines() if "|---" not in line] for table in found]


def hexadecimal(tensor: Tensor) -> str:
    return bytes(tensor.tolist()).hex(" ")


def smollm2(layers: int = 30, vocab_size: int = 49152, device: str = "meta") -> Decoder:
    """SmolLM2-135M's shape."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers, "head_dim": 64}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    with torch.device(device):
        return Decoder(DecoderConfig(vocab_size=vocab_size, tie_word_embeddings=True, **sizes, **heads))


# Names and links


@lru_cache
def defined_in(path: Path) -> set[str]:
    """Functions, classes and methods (Class.method) of a file."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


def test_every_place_named_in_equations_exists() -> None:
    places = re.findall(r"`([\w/]+\.py):([\w.]+)`", text(EQUATIONS))
    assert len(places) > 50
    wrong = [f"{file}:{name}" for file, name in places if name not in defined_in(ROOT / file)]
    assert not wrong


def test_every_test_named_in_the_docs_exists() -> None:
    named = {name for page in PAGES for name in re.findall(r"`((?:tests/)?(?:peers/)?test_\w+\.py)`", text(page))}
    assert len(named) > 15
    assert not [name for name in named if not (ROOT / "tests" / name.removeprefix("tests/")).is_file()]


def test_every_equation_has_a_place_and_a_test() -> None:
    listed = [table for table in tables(EQUATIONS) if table[0][2:] == ["where", "test"]]
    assert len(listed) == len(re.findall(r"^## \d", text(EQUATIONS), re.MULTILINE)), "one table for each section"
    for cells in (cells for table in listed for cells in table[1:]):
        assert re.search(r"`[\w/]+\.py:\w+", cells[2]), cells
        assert re.search(r"`(peers/)?test_\w+\.py`", cells[3]), cells


def anchors(page: Path) -> set[str]:
    """The anchors of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", text(page), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


# equations.md


def test_what_training_holds_in_memory() -> None:
    model = smollm2()
    _, total = count_parameters(model)
    linear = [module.weight for path, module in linear_layers(model).items() if path != HEAD]
    bytes_of = {shape: quantize(torch.zeros(shape)).nbytes for shape in {tuple(weight.shape) for weight in linear}}
    in_4bit = sum(bytes_of[tuple(weight.shape)] for weight in linear)
    qlora = in_4bit + 4 * (total - sum(weight.numel() for weight in linear))
    add_adapter(model, LoRAConfig(r=16))
    trained, _ = count_parameters(model)
    rows = (("full", 0, total), ("lora", 4 * total, trained), ("qlora", qlora, trained))
    for method, frozen, numbers in rows:
        assert_holds(EQUATIONS, row(method, f"{frozen / 1e6:.1f}", f"{16 * numbers / 1e6:.1f}", f"{numbers:,}"))
    assert_says(EQUATIONS, f"Of qlora's {qlora / 1e6:.1f} MB, the 4-bit layers are {in_4bit / 1e6:.1f} MB.")


def test_nf4_levels() -> None:
    levels = [f"{level:.4f}" for level in nf4_codebook().tolist()]
    assert_holds(EQUATIONS, row("level", *levels[:8]), row("level", *levels[8:]))


def test_bits_a_weight() -> None:
    weight = torch.zeros(1024, 1024)
    for double_quant, sum_of in ((False, "4 + 32/64"), (True, "4 + 8/64 + 32/(64·256)")):
        bits = quantize(weight, double_quant=double_quant).bits_per_param
        assert_says(EQUATIONS, f"{sum_of} = {bits:.3f}")


@torch.no_grad()
def update(r: int, use_rslora: bool, at_random: bool) -> tuple[float, float]:
    """(s, ‖ΔW‖) of the example of section 5, through a LoRALinear on a base of zeros."""
    torch.manual_seed(0)
    config = LoRAConfig(r=r, alpha=16, use_rslora=use_rslora)
    base = nn.Linear(64, 64, bias=False)
    base.weight.zero_()
    layer = LoRALinear(base, AdapterState(active=("default",)))
    layer.add("default", config, "layer")
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    A.copy_(0.1 * (torch.randn(A.shape) if at_random else torch.ones(A.shape)))
    B.copy_(0.01 * (torch.randn(B.shape) if at_random else torch.ones(B.shape)))
    return config.scaling("layer"), layer(torch.eye(64)).norm().item()


@pytest.mark.parametrize("r", [8, 16, 32, 64])
def test_what_alpha_does_when_r_doubles(r: int) -> None:
    cells = []
    for use_rslora in (False, True):
        (s, same_way), (_, at_random) = (update(r, use_rslora, at_random) for at_random in (False, True))
        cells += [f"{s:.2f}", f"{same_way:.2f}", f"{at_random:.2f}"]
    assert_holds(EQUATIONS, row(r, *cells))


def test_linear_weights_by_part() -> None:
    layers = {path: module.weight.numel() for path, module in linear_layers(smollm2()).items() if path != HEAD}
    for label, names in (("attention: q, k, v, o", ATTENTION), ("MLP: gate, up, down", MLP)):
        weights, total = sum(n for path, n in layers.items() if path.endswith(names)), sum(layers.values())
        assert_holds(EQUATIONS, row(label, f"{weights:,}", f"{weights / total:.0%}"))


TARGETS = {"q, v": ("q_proj", "v_proj"), "q, k, v, o": ATTENTION, "gate, up, down": MLP, "all-linear": "all-linear"}


@pytest.mark.parametrize(("label", "r"), [*((label, 16) for label in TARGETS), ("q, k, v, o", 42)])
def test_numbers_trained_by_targets(label: str, r: int) -> None:
    model = smollm2()
    _, before = count_parameters(model)
    add_adapter(model, LoRAConfig(r=r, target_modules=TARGETS[label]))
    trained, _ = count_parameters(model)
    assert_holds(EQUATIONS, row(label, r, f"{trained:,}", f"{trained / before:.2%}", f"{16 * trained / 1e6:.1f}"))


def rope_config(head_dim: int, rope: RopeConfig) -> DecoderConfig:
    return DecoderConfig(8, head_dim, 8, 1, 1, 1, head_dim, rope=rope)


def test_rmsnorm_rope_and_silu() -> None:
    with torch.no_grad():
        normed = RMSNorm(2, 0.0)(torch.tensor([3.0, 4.0])).tolist()
    assert_says(EQUATIONS, "({:.4f}, {:.4f})".format(*normed))
    frequencies = rope_frequencies(rope_config(4, RopeConfig(theta=10_000.0)))
    cos, sin = rope_tables(torch.tensor([[3]]), frequencies)
    turned = apply_rope(torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 1, 4), cos, sin).flatten().tolist()
    assert_says(EQUATIONS, "ω = ({:g}, {:.2g})".format(*frequencies.tolist()))
    assert_says(EQUATIONS, "({:.4f}, {:.4f}, {:.4f}, {:.4f})".format(*turned))
    assert_says(EQUATIONS, f"silu(1) = {nn.functional.silu(torch.tensor(1.0)).item():.4f}")


def test_llama3_rope_divisors() -> None:
    config = rope_config(64, RopeConfig("llama3", 500_000.0, 8.0, 1.0, 4.0, 8192))
    plain, divisors = rope_frequencies(rope_config(64, RopeConfig(theta=500_000.0))), llama3_factors(config)
    assert torch.equal(rope_frequencies(config), plain / divisors)
    for i in range(14, 19):
        wavelength = 2 * torch.pi / plain[i].item()
        assert_holds(EQUATIONS, row(i, f"{wavelength:.0f}", f"{8192 / wavelength:.2f}", f"{divisors[i]:.2f}"))


def test_cross_entropy_and_its_gradient() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
    nll = kernels.linear_cross_entropy(logits, torch.eye(3), torch.tensor([0]))
    nll.sum().backward()
    p, dz = torch.softmax(logits, dim=1).flatten().tolist(), logits.grad.flatten().tolist()
    assert_says(EQUATIONS, "p = ({:.4f}, {:.4f}, {:.4f}), nll = {:.4f}".format(*p, nll.item()))
    assert_says(EQUATIONS, "dz = ({:.4f}, {:.4f}, {:.4f})".format(*dz))


def test_chunks_of_the_logits() -> None:
    module = importlib.import_module("kernels.linear_cross_entropy")  # the package's name for it is the function
    V, M = 49_152, 1024
    chunks = module._chunks(M, V)
    rows = chunks[0].stop
    assert_holds(EQUATIONS, row("all at once", M, f"{4 * M * V / 1e6:.1f}"))
    assert_holds(EQUATIONS, row(f"in {len(chunks)} chunks", rows, f"{4 * rows * V / 1e6:.1f}"))


def test_a_mean_of_means_weighs_tokens_by_their_company() -> None:
    batches = [torch.full((1, 2), 1.0), torch.full((1, 8), 0.5)]  # nll (B, T-1)
    for label, num_items, divided_by in (("mean of the two means", None, 2), ("one mean over the window", 10, 1)):
        leaves = [batch.clone().requires_grad_() for batch in batches]
        masks = [torch.ones(1, batch.shape[1] + 1) for batch in batches]
        shares = [sft_loss(nll, mask, num_items) for nll, mask in zip(leaves, masks, strict=True)]
        loss = sum(shares) / divided_by
        loss.backward()
        weights = [f"{leaf.grad[0, 0]:.4f}" for leaf in leaves]
        assert_holds(EQUATIONS, row(label, f"{loss.item():.3f}", *weights))


@pytest.mark.parametrize("gradient", [0.5, 0.005])
def test_the_first_step_of_adamw(gradient: float) -> None:
    parameter = nn.Parameter(torch.ones(1, 1))
    optimizer = torch.optim.AdamW(decay_groups([("matrix", parameter)], 0.01), lr=0.1)
    parameter.grad = torch.full((1, 1), gradient)
    optimizer.step()
    assert_says(EQUATIONS, f"p = {parameter.item():.4f}. For g = 0.005 it is\n{parameter.item():.4f} as well")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: str) -> None:
    rates = [learning_rate(s, total_steps=10, peak=1.0, warmup_steps=2, schedule=schedule) for s in range(10)]
    assert_holds(EQUATIONS, row(schedule, *(f"{rate:.3f}" for rate in rates)))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 0, 1.0), (1.0, 3, 1.0), (1.0, 3, 0.75)]
)
def test_sampling_filters(temperature: float, top_k: int, top_p: float) -> None:
    logps = torch.log_softmax(torch.tensor([[0.50, 0.30, 0.15, 0.05]]).log() / temperature, dim=1)
    kept, tokens = candidates(logps, top_k=top_k, top_p=top_p)
    p = torch.zeros(4).scatter(0, tokens[0], torch.softmax(kept[0], dim=0)).tolist()
    shown = [f"{x:.3f}" if x else "0" for x in p]
    assert_holds(EQUATIONS, row(temperature, top_k or "off", top_p, *shown))


# formats.md


def test_nf4_bytes() -> None:
    q = quantize(WEIGHTS, double_quant=False)
    indices = unpack(q.packed, q.numel).tolist()
    scaled, back = (WEIGHTS / q.absmax).flatten().tolist(), dequantize(q).flatten().tolist()
    for i, weight in enumerate(WEIGHTS.flatten().tolist()):
        level = q.code[indices[i]].item()
        assert_holds(FORMATS, row(i, f"{weight:.1f}", f"{scaled[i]:.2f}", indices[i], f"{level:.4f}", f"{back[i]:.4f}"))
    for i, byte in enumerate(q.packed.tolist()):
        high, low = byte >> 4, byte & 15
        assert [high, low] == indices[2 * i : 2 * i + 2]
        assert_holds(FORMATS, row(i, f"{2 * i}, {2 * i + 1}", high, low, f"{high:04b} {low:04b}", f"{byte:02x}"))
    five = quantize(WEIGHTS.flatten()[:5], double_quant=False)
    assert_says(FORMATS, f"`packed` is `{hexadecimal(q.packed)}`", f"alone are `{hexadecimal(five.packed)}`")
    assert_says(FORMATS, f"absmax = {q.absmax.item()} ", f"1 / absmax = {1 / q.absmax.item()} ")


def test_double_quantized_scales() -> None:
    absmax, levels = torch.tensor([0.5, 2.0, 2.5, 3.0]), dynamic_map(signed=True)
    absmax_8bit, absmax2, offset = quantize_absmax(absmax, levels)
    back = dequantize_absmax(absmax_8bit, levels, absmax2, offset).tolist()
    for i, index in enumerate(absmax_8bit.tolist()):
        centred = (absmax[i] - offset).item()
        scaled, level = centred / absmax2.item(), levels[index].item()
        cells = (absmax[i].item(), centred, f"{scaled:.4f}", index, f"{level:.4f}", f"{back[i]:.4f}")
        assert_holds(FORMATS, row(i, *cells))
    assert_says(FORMATS, f"absmax_offset = mean = {offset.item()} ", f"|absmax - offset| = {absmax2.item()} ")
    assert_says(FORMATS, f"the four bytes `{hexadecimal(absmax_8bit)}`")


def json_blocks() -> list[str]:
    return re.findall(r"^```json\n(.*?)^```", text(FORMATS), re.MULTILINE | re.DOTALL)


def test_bitsandbytes_state_dict() -> None:
    weight = ((torch.arange(192 * 576) * 37 % 101 - 50) / 64).bfloat16().view(192, 576)
    q = quantize(weight)
    tensors = to_bnb_state_dict(q, "name")
    for key, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        assert_holds(FORMATS, row(f"`{key}`", dtype, tuple(tensor.shape), f"{tensor.nbytes:,}"))
    assert json_blocks()[0].strip() == bytes(tensors["name.quant_state.bitsandbytes__nf4"].tolist()).decode()
    assert_says(FORMATS, f"n = {q.numel:,} weights, {q.n_blocks:,} blocks")
    assert_says(FORMATS, f"{q.nbytes:,} bytes, maps aside: {q.bits_per_param:.4f} bits a weight")


def test_adapter_files(tmp_path: Path) -> None:
    model = smollm2(layers=1, vocab_size=8, device="cpu")
    add_adapter(model, LoRAConfig(r=16, alpha=16))
    save_adapter(model, tmp_path / "adapter", base_model_name="smollm2-135m")
    saved = safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for half in ("lora_A", "lora_B"):
        key = f"base_model.model.{K_PROJ}.{half}.weight"
        assert_holds(FORMATS, row(f"`{key}`", tuple(saved[key].shape), f"{saved[key].nbytes:,}"))
    size = sum(tensor.nbytes for tensor in saved.values())
    assert_says(FORMATS, f"{30 * len(saved)} tensors, {30 * size:,} bytes")
    assert json.loads(json_blocks()[2]) == json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())


def test_gguf_row_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.gguf_checkpoint.read_rows", lambda header, name, start, stop: torch.arange(start, stop))
    stored_as, config = {"q": "blk.0.attn_q.weight"}, SimpleNamespace(head_dim=8)
    head = SimpleNamespace(header=None, reordered=True, stored_as=stored_as, config=config)
    read_from = GGUFCheckpoint.read_rows(head, "q", 0, 8).tolist()
    assert_holds(FORMATS, row("is read from row of the file", *read_from))
    assert_holds(FORMATS, row("is Hugging Face's row", *(read_from.index(stored) for stored in range(8))))


def test_checkpoint_files(tmp_path: Path) -> None:
    model = smollm2(layers=1, vocab_size=8, device="cpu")
    add_adapter(model, LoRAConfig(r=16, target_modules=("k_proj",)))
    parameters = trainable_parameters(model)
    optimizer = torch.optim.AdamW(decay_groups(parameters, 0.01))
    for _, parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    folder = save_checkpoint(tmp_path, 40, parameters, optimizer, {"seconds": 1.0, "tokens": 1}, keep=1)
    assert_says(FORMATS, f"checkpoints/{folder.name}/", *(f"  {path.name}" for path in folder.iterdir()))
    shown = [cells for table in tables(FORMATS) if table[0] == ["file", "key", "dtype", "shape"] for cells in table[1:]]
    stored = [
        [file, f"`{key}`", str(tensor.dtype).removeprefix("torch."), str(tuple(tensor.shape))]
        for file in ("trainable", "optimizer")
        for key, tensor in safetensors.torch.load_file(folder / f"{file}.safetensors").items()
        if key.startswith(f"{K_PROJ}.lora_A.default")
    ]
    assert sorted(shown) == sorted(stored)
    assert documented_fields("field of state.json") == set(json.loads((folder / "state.json").read_text()))


def documented_fields(heading: str) -> set[str]:
    """The names in backticks in the first column of the table with that heading."""
    (table,) = (table for table in tables(FORMATS) if table[0][0] == heading)
    return {name for cells in table[1:] for name in re.findall(r"`(\w+)`", cells[0])}


def test_run_folder() -> None:
    assert documented_fields("field of environment") == set(environment("hash"))
    writers = [ROOT / "trainers" / name for name in ("run.py", "sft.py", "prepare.py", "results.py", "optimizers.py")]
    source = [node for path in writers for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    written = {node.value for node in source if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert documented_fields("field of metrics.jsonl") <= written
    files = {"metrics.jsonl", "checkpoints", "adapter", "model", "samples.jsonl"}
    assert files <= written
    assert_says(FORMATS, *(f"  {name}" for name in files), "  plots/loss.png")
