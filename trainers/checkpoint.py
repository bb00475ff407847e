"""Checkpoints: everything a run needs to go on to the same bits.

    step-000040/
      trainable.safetensors    every trainable parameter, in its own dtype
      buffer.safetensors       what else a trainer keeps between steps, rollouts for example; not there where nothing is
      optimizer.safetensors    <parameter>.exp_avg, <parameter>.exp_avg_sq, <parameter>.step
      state.json               step, counters, the state of torch's generators in hex (dropout), and a checksum of each
                               other file

The order of the data needs no state: it is a function of seed and step. A folder is written aside and renamed, so one
that has its name is whole.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lora.files import written_aside
from optim import PagedAdamW

FILES = ("trainable.safetensors", "optimizer.safetensors", "buffer.safetensors")
RNGS = ("torch_rng", "cuda_rng")
Parameters = Sequence[tuple[str, nn.Parameter]]


def save_checkpoint(
    folder: Path,
    step: int,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    counters: dict[str, Any],
    keep: int,
    *,
    buffer: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write folder/step-N, then delete all but the last `keep`. Returns its path."""
    path = folder / f"step-{step:06d}"
    state = {"step": step, "counters": counters}
    state |= {name: generator.numpy().tobytes().hex() for name, generator in rng_states().items()}
    with written_aside(path) as aside:
        weights = {name: parameter.detach().cpu().contiguous() for name, parameter in parameters}
        safetensors.torch.save_file(weights, aside / "trainable.safetensors")
        _save_optimizer(aside, parameters, optimizer)
        if buffer:
            safetensors.torch.save_file(dict(buffer), aside / "buffer.safetensors")
        state["sha256"] = {file: _sha256(aside / file) for file in FILES if (aside / file).exists()}
        (aside / "state.json").write_text(json.dumps(state), encoding="utf-8")
    for old in all_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def all_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def load_checkpoint(path: Path, parameters: Parameters, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any]]:
    """Put parameters, optimizer state and torch's RNG back. Returns (step, counters).

    Raises ValueError, naming the file and the parameter, when something is missing, corrupt or of another shape.
    """
    state = _read_json(path / "state.json")
    weights = _read_tensors(path / "trainable.safetensors")
    for name, parameter in parameters:
        _fits(weights.get(name), parameter, f"{path / 'trainable.safetensors'}: {name}")
    _load_optimizer(path, parameters, optimizer)
    _verify(path, state)
    with torch.no_grad():
        for name, parameter in parameters:
            parameter.copy_(weights[name])
    try:
        saved = [name for name in RNGS if name in state or name == "torch_rng"]
        rng = {name: torch.frombuffer(bytearray.fromhex(state[name]), dtype=torch.uint8) for name in saved}
        step, counters = int(state["step"]), dict(state["counters"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / 'state.json'} is not a checkpoint's state: {error}") from None
    set_rng_states(rng)
    return step, counters


def rng_states() -> dict[str, Tensor]:
    """Of torch's generators, uint8: the CPU's, and the GPU's where there is one."""
    states = {"torch_rng": torch.get_rng_state()}
    return states | ({"cuda_rng": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_rng_states(states: Mapping[str, Tensor]) -> None:
    """What rng_states gave. A GPU's is left out where there is no GPU now."""
    torch.set_rng_state(states["torch_rng"])
    if "cuda_rng" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda_rng"])


def read_buffer(path: Path) -> dict[str, Tensor]:
    """What the trainer kept in a checkpoint that load_checkpoint has verified; empty where it kept nothing."""
    file = path / "buffer.safetensors"
    return _read_tensors(file) if file.exists() else {}


def _save_optimizer(folder: Path, parameters: Parameters, optimizer: torch.optim.Optimizer) -> None:
    if isinstance(optimizer, PagedAdamW):
        optimizer.save_state(folder, _names(parameters, optimizer))
        return
    moments = {
        f"{name}.{key}": value.detach().cpu()
        for name, parameter in parameters
        for key, value in optimizer.state[parameter].items()
    }
    safetensors.torch.save_file(moments, folder / "optimizer.safetensors")


def _load_optimizer(folder: Path, parameters: Parameters, optimizer: torch.optim.Optimizer) -> None:
    if isinstance(optimizer, PagedAdamW):
        optimizer.load_state(folder, _names(parameters, optimizer))
        return
    path = folder / "optimizer.safetensors"
    moments = _read_tensors(path)
    for name, parameter in parameters:
        _require_step(moments.get(f"{name}.step"), f"{path}: {name}.step")
        for key in ("exp_avg", "exp_avg_sq"):
            _fits(moments.get(f"{name}.{key}"), parameter, f"{path}: {name}.{key}")
        optimizer.state[parameter] = {
            "step": moments[f"{name}.step"],
            "exp_avg": moments[f"{name}.exp_avg"].to(parameter.device),
            "exp_avg_sq": moments[f"{name}.exp_avg_sq"].to(parameter.device),
        }


def _names(parameters: Parameters, optimizer: PagedAdamW) -> list[str]:
    """The parameters' names in the order of the optimizer's groups."""
    names = {parameter: name for name, parameter in parameters}
    return [names[parameter] for parameter in optimizer.parameters]


def _verify(path: Path, state: dict[str, Any]) -> None:
    """Raises ValueError, naming the file, when it is not what was written."""
    for file, wanted in dict(state.get("sha256", {})).items():
        if file in FILES and _sha256(path / file) != wanted:
            raise ValueError(f"{path / file} is damaged: its bytes are not those that were saved (sha256)")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _fits(tensor: Tensor | None, parameter: nn.Parameter, where: str) -> None:
    if tensor is None or tensor.shape != parameter.shape:
        found = "nothing" if tensor is None else tuple(tensor.shape)
        raise ValueError(f"{where} must have shape {tuple(parameter.shape)}, found {found}")


def _require_step(tensor: Tensor | None, where: str) -> None:
    if tensor is None or tensor.numel() != 1:
        raise ValueError(f"{where} must be one number, found {'nothing' if tensor is None else tuple(tensor.shape)}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(state).__name__}")
    return state


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
