"""trainers/sft with what an adapter may have beside A and B: flags, gradients, resume, and the files at the end."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qlora
from data.batch import collate
from data.encode import encode_dataset
from data.schema import detect
from lora import load_adapter, trainable_parameters
from lora.peft_format import CONFIG, WEIGHTS
from models import load_model, load_tokenizer
from tests.small_base import ROWS, write_base, write_rows
from tests.test_sft import adapter_bytes, base_bytes
from trainers import sft
from trainers.checkpoint import all_checkpoints
from trainers.logprobs import per_token_nll

pytestmark = pytest.mark.filterwarnings("ignore:.*share one weight in this model")
FLAGS = [
    {"bias": "lora_only", "target_modules": "q_proj,v_proj,embed_tokens", "layers_to_transform": [1]},
    {"bias": "all", "target_modules": "up_proj", "modules_to_save": "lm_head,norm"},
    {"target_modules": "q_proj,lm_head,embed_tokens", "exclude_modules": r".*layers\.0\..*"},
    {"modules_to_save": "embed_tokens", "exclude_modules": "gate_proj,down_proj"},
]
EACH = pytest.mark.parametrize("flags", FLAGS, ids=str)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied, with biases in the attention."""
    folder = write_base(tmp_path_factory.mktemp("base") / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "self_attn" in name]:
        tensors[name.replace(".weight", ".bias")] = torch.randn(len(tensors[name])) / 10
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def config(base: Path, tmp_path: Path) -> sft.SFTConfig:
    data = write_rows(tmp_path / "rows.jsonl")
    return sft.SFTConfig(
        data=str(data), out=str(tmp_path / "run"), model=str(base), max_steps=4, batch_size=2, accumulation=1, r=2,
        learning_rate=5e-3, samples=0, threads=1,
    )  # fmt: skip


@pytest.mark.parametrize(("method", "flags"), [("lora", FLAGS[0]), *(("qlora", flags) for flags in FLAGS)], ids=str)
def test_everything_learns_and_resumes_to_the_same_bytes(config, method, flags):
    """The checkpoint holds all that is trained; the base keeps every byte; the saved adapter is the model in memory."""
    config = replace(config, method=method, save_every=2, **flags)
    model = sft.prepare_model(config)
    before, starts = base_bytes(model), {name: p.clone() for name, p in trainable_parameters(model)}
    trained = sft.train(config, quiet=True)
    assert base_bytes(trained.model) == before
    for name, parameter in trainable_parameters(trained.model):
        assert not torch.equal(parameter, starts[name]), name
    checkpoints = all_checkpoints(Path(config.out) / "checkpoints")
    assert load_file(checkpoints[-1] / "trainable.safetensors").keys() == starts.keys()

    again = load_model(config.model, quantize="nf4" if method == "qlora" else None)
    load_adapter(again, Path(config.out) / "adapter")
    ids = torch.arange(20)[None]
    assert torch.equal(again(ids), trained.model.eval()(ids))

    whole = adapter_bytes(config.out)
    shutil.rmtree(checkpoints[-1])
    shutil.rmtree(Path(config.out) / "adapter")
    sft.train(replace(config, resume=True), quiet=True)
    assert adapter_bytes(config.out) == whole


@EACH
def test_the_chunked_loss_gives_the_gradients_of_the_logits(base, config, flags):
    """Through Decoder.head(), recomputing or not, and through plain logits."""
    tokenizer = load_tokenizer(base)
    examples = encode_dataset(tokenizer, ROWS[:3], detect(ROWS, "r"), max_seq_length=64, path="r").examples
    batch = collate(examples, pad_id=tokenizer.pad_id)
    model = sft.prepare_model(replace(config, **flags)).train()
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))

    def fused() -> torch.Tensor:
        nll = per_token_nll(model, batch.input_ids, batch.segment_ids, batch.completion_mask)
        return sft.sft_loss(nll, batch.completion_mask)

    def plain() -> torch.Tensor:
        logits = model(batch.input_ids, segment_ids=batch.segment_ids)[:, :-1]
        targets = torch.where(batch.completion_mask[:, 1:] != 0, batch.input_ids[:, 1:], -100)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def gradients(loss) -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss().backward()
        return {name: p.grad.clone() for name, p in trainable_parameters(model)}

    wanted, found = gradients(plain), gradients(fused)
    model.gradient_checkpointing = True
    recomputed = gradients(fused)
    eps = torch.finfo(torch.float32).eps
    size = max(gradient.norm() for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 64 * eps * size, name
        assert torch.equal(recomputed[name], found[name]), name


def test_bf16_trains_what_is_whole_in_fp32(config):
    trained = sft.train(replace(config, dtype="bf16", **FLAGS[1]), quiet=True)
    assert {p.dtype for _, p in trainable_parameters(trained.model)} == {torch.float32}
    assert trained.model.compute_dtype == trained.model.lm_head.weight.dtype == torch.bfloat16
    assert {t.dtype for t in load_file(Path(trained.result.out) / "adapter" / WEIGHTS).values()} == {torch.float32}


def test_the_flags_of_the_command(config, base, tmp_path):
    flags = "--target-modules q_proj,v_proj --exclude-modules v_proj --layers-to-transform 0 1 --bias lora_only"
    run = f"--data {config.data} --out {tmp_path / 'cli'} --model {base} --max-steps 1 --batch-size 2 --samples 0"
    assert qlora.main(["sft", *run.split(), *flags.split(), "--modules-to-save", "lm_head,model.norm"]) == 0
    fields = json.loads((tmp_path / "cli" / "adapter" / CONFIG).read_text())
    expected = {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"], "layers_to_transform": [0, 1]}
    assert expected.items() <= fields.items()
    assert (fields["bias"], fields["modules_to_save"]) == ("lora_only", ["lm_head", "model.norm"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules_to_save": "lm_hed"}, "modules_to_save: no module's path ends in 'lm_hed'"),
        ({"modules_to_save": "q_proj"}, "q_proj is in 4 bits, and what is trained whole must be dense"),
        ({"layers_to_transform": [7]}, "match no linear layer"),
        ({"target_modules": "lm_head", "dropout": 0.1}, "an adapter on lm_head cannot train with dropout"),
        ({"bias": "some"}, "LoRA bias must be one of none, all, lora_only, got 'some'"),
    ],
)
def test_what_cannot_be_trained_is_one_line(config, changes, message):
    with pytest.raises(ValueError, match=message):
        sft.train(replace(config, **changes), quiet=True)
