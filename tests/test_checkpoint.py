"""trainers/checkpoint: state survives to the bit; a damaged checkpoint is one clear error."""

import json

import pytest
import torch
from torch import nn

from trainers.checkpoint import all_checkpoints, load_checkpoint, read_buffer, save_checkpoint


def trained(seed: int):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    return list(model.named_parameters()), optimizer


def test_parameters_moments_and_rng_come_back_to_the_bit(tmp_path):
    parameters, optimizer = trained(0)
    save_checkpoint(tmp_path, 7, parameters, optimizer, {"tokens": 5}, keep=2)
    drawn = torch.rand(3)
    others, other_optimizer = trained(1)
    assert load_checkpoint(all_checkpoints(tmp_path)[-1], others, other_optimizer) == (7, {"tokens": 5})
    assert torch.equal(torch.rand(3), drawn)
    for (_, p), (_, q) in zip(parameters, others, strict=True):
        assert torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, other_optimizer.state[q][key])


def test_a_gpus_generator_comes_back_where_there_is_a_gpu(tmp_path, monkeypatch):
    (parameters, optimizer), came = trained(0), []
    with monkeypatch.context() as gpu:
        gpu.setattr(torch.cuda, "is_available", lambda: True)
        gpu.setattr(torch.cuda, "get_rng_state", lambda: torch.arange(16, dtype=torch.uint8))
        gpu.setattr(torch.cuda, "set_rng_state", came.append)
        save_checkpoint(tmp_path, 1, parameters, optimizer, {}, keep=1)
        load_checkpoint(tmp_path / "step-000001", parameters, optimizer)
    load_checkpoint(tmp_path / "step-000001", parameters, optimizer)
    assert [state.tolist() for state in came] == [list(range(16))]


def test_only_the_last_ones_are_kept(tmp_path):
    parameters, optimizer = trained(0)
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, parameters, optimizer, {}, keep=2)
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step-000002", "step-000010"]


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("trainable.safetensors", lambda b: b[:50], "trainable.safetensors cannot be read"),
        ("optimizer.safetensors", lambda b: b"", "optimizer.safetensors cannot be read"),
        ("state.json", lambda b: b"{", "state.json cannot be read"),
        ("state.json", lambda b: b"[]", "state.json must hold a JSON object"),
        ("state.json", lambda b: json.dumps({"step": 1}).encode(), "state.json is not a checkpoint's state"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, file, damage, message):
    parameters, optimizer = trained(0)
    path = save_checkpoint(tmp_path, 1, parameters, optimizer, {}, keep=1)
    (path / file).write_bytes(damage((path / file).read_bytes()))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path, parameters, optimizer)


def test_another_model_is_refused_by_the_parameter_that_does_not_fit(tmp_path):
    parameters, optimizer = trained(0)
    path = save_checkpoint(tmp_path, 1, parameters, optimizer, {}, keep=1)
    wider = [("0.weight", nn.Parameter(torch.zeros(9, 4)))]
    with pytest.raises(ValueError, match=r"0.weight must have shape \(9, 4\), found \(3, 4\)"):
        load_checkpoint(path, wider, torch.optim.AdamW([wider[0][1]]))


def test_what_a_trainer_keeps_besides_comes_back_and_is_checked(tmp_path):
    parameters, optimizer = trained(0)
    buffer = {"rollouts.ids": torch.arange(5), "rollouts.logps": torch.randn(5)}
    path = save_checkpoint(tmp_path, 1, parameters, optimizer, {}, keep=2, buffer=buffer)
    found = read_buffer(path)
    assert found.keys() == buffer.keys()
    assert all(torch.equal(found[key], buffer[key]) for key in buffer)
    file = path / "buffer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match=r"buffer\.safetensors is damaged"):
        load_checkpoint(path, parameters, optimizer)
    assert read_buffer(save_checkpoint(tmp_path, 2, parameters, optimizer, {}, keep=2)) == {}
