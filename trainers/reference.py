"""The reference model of DPO: what the model said before training of every answer, live or computed once.

lora, qlora    the same weights with the adapter switched off: no second model
full           a second, frozen model; with --precompute-ref only until its numbers are known

runs/NAME/reference.safetensors     with --precompute-ref: train (n, 2) and eval (m, 2), fp32, log-probabilities of
                                    (chosen, rejected) summed over tokens; in the metadata a hash of the ids
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.preference import EncodedPair
from lora import disabled_adapters
from models import Decoder

from . import world
from .flags import TrainerFlags
from .pairs import PairBatch, answer_logps, pair_batches
from .prepare import frozen_base

Reference = Callable[[PairBatch], Tensor]
"""Of a micro-batch: log-probabilities (2B,) summed over answers, the chosen ones first."""


@torch.no_grad()
def logps_now(model: Decoder, batch: PairBatch) -> Tensor:
    """Of a model that is the reference now."""
    return answer_logps(model, batch.rows).sums


def live_reference(flags: TrainerFlags, model: Decoder) -> Reference:
    """Computed at each call: by the model without its adapter, or for method full by a frozen copy, loaded here."""
    if flags.method == "full":
        return partial(logps_now, frozen_base(flags))

    def without_adapter(batch: PairBatch) -> Tensor:
        with disabled_adapters(model):
            return logps_now(model, batch)

    return without_adapter


def from_table(table: Tensor) -> Reference:
    """Of a table (n, 2) of all pairs."""
    return lambda batch: table[batch.numbers].T.reshape(-1)


def compute_table(model: Decoder, pairs: Sequence[EncodedPair], size: int, pad_id: int) -> Tensor:
    """(n, 2) of all pairs. The model must be the reference now."""
    batches = pair_batches(pairs, range(len(pairs)), size, pad_id)
    return torch.cat([torch.empty(0, 2), *(logps_now(model, batch).view(2, -1).T.cpu() for batch in batches)])


def read_tables(path: Path, sets: Mapping[str, Sequence[EncodedPair]]) -> dict[str, Tensor] | None:
    """What write_tables wrote for these pairs; None where there is no such file.

    Raises ValueError, naming the file, when it is damaged or belongs to other pairs.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            known = (file.metadata() or {}).get("sha256")
        tables = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    shapes = {name: (len(pairs), 2) for name, pairs in sets.items()}
    if known != ids_hash(sets) or {name: tuple(table.shape) for name, table in tables.items()} != shapes:
        raise ValueError(f"{path} is of other pairs than this run's: delete it, and it is computed again")
    return tables


def write_tables(path: Path, tables: Mapping[str, Tensor], sets: Mapping[str, Sequence[EncodedPair]]) -> None:
    """Written aside, then renamed; by one rank."""
    if world.is_main():
        temporary = path.with_name(path.name + ".tmp")
        whole = {name: table.contiguous() for name, table in tables.items()}
        safetensors.torch.save_file(whole, temporary, metadata={"sha256": ids_hash(sets)})
        os.replace(temporary, path)


def ids_hash(sets: Mapping[str, Sequence[EncodedPair]]) -> str:
    """sha256 of every pair's ids and masks."""
    digest = hashlib.sha256()
    for name, pairs in sets.items():
        rows = [[side.ids, side.completion_mask] for pair in pairs for side in (pair.chosen, pair.rejected)]
        digest.update(json.dumps([name, rows]).encode())
    return digest.hexdigest()
