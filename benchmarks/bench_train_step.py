"""One QLoRA training step of SmolLM2-135M, ours beside transformers + peft + bitsandbytes.

    4 rows × 256 tokens, every token learnt, r = 16 on all linear layers, NF4 with double quantization, AdamW

Every arm runs in a process of its own, since a process's peak memory cannot be lowered again, and the arms take turns
for `--rounds` rounds. Before any time counts, the losses of the first step must agree. Columns of the CSV:

    tokens_per_second   of the timed steps: forward, backward, clipping left out, optimizer
    peak_process_bytes  peak resident memory of the process, Python, libraries and loading included
    live_tensor_bytes   peak of all tensors alive at once in one (untimed) step: weights, activations, gradients, state
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.results import write_rows

ROOT = Path(__file__).resolve().parent.parent
ROWS, TOKENS, RANK = 4, 256, 16
PEER = "transformers + peft + bitsandbytes"
ARMS = [(who, checkpointed) for checkpointed in (False, True) for who in ("ours", "peer")]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that operations make, while it lives; `peak` is the largest sum seen."""

    def __init__(self, already: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: dict[int, weakref.ref[Any]] = {}
        for tensor in already:
            self.add(tensor)

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen[key] = weakref.ref(storage, lambda _: self.drop(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def drop(self, key: int, size: int) -> None:
        self.now -= size
        del self.seen[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return out


def ours(checkpointed: bool, dtype: str) -> tuple[Any, Any, Any]:
    """The model, its trainable parameters, and loss(ids)."""
    from trainers import sft
    from trainers.logprobs import per_token_nll

    config = sft.SFTConfig(data="", out="", r=RANK, dtype=dtype, gradient_checkpointing=checkpointed, seed=0)
    model = sft.prepare_model(config).train()

    def loss(ids: torch.Tensor) -> torch.Tensor:
        all_learnt = torch.ones_like(ids)
        return sft.sft_loss(per_token_nll(model, ids, all_learnt, all_learnt), all_learnt)

    return model, [p for p in model.parameters() if p.requires_grad], loss


def peer(checkpointed: bool, dtype: str, folder: str) -> tuple[Any, Any, Any]:
    """As `ours`, from the same weights in a folder."""
    import transformers
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    transformers.logging.set_verbosity_error()
    compute = torch.bfloat16 if dtype == "bf16" else torch.float32
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=compute, quantization_config=four_bits, device_map="cpu"
    )
    if checkpointed:
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear")).train()

    def loss(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss

    return model, [p for p in model.parameters() if p.requires_grad], loss


def measure(who: str, checkpointed: bool, dtype: str, folder: str, steps: int) -> dict[str, Any]:
    """One arm, in this process."""
    from trainers.metrics import peak_memory_bytes

    torch.manual_seed(0)
    model, parameters, loss_of = ours(checkpointed, dtype) if who == "ours" else peer(checkpointed, dtype, folder)
    gc.collect()
    gc.freeze()  # in every arm, as a run of ours does (trainers/run.py)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    batches = [
        torch.randint(1000, 40_000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(i)) for i in range(2)
    ]

    def step(ids: torch.Tensor) -> float:
        loss = loss_of(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    first = step(batches[0])
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step(batches[1])
        seconds.append(time.perf_counter() - start)
    peak = peak_memory_bytes()
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    with LiveBytes([*model.parameters(), *model.buffers(), *state]) as live:
        step(batches[1])
    return {
        "first_loss": first,
        "seconds": seconds,
        "peak_process_bytes": peak,
        "live_tensor_bytes": live.peak,
    }


def in_a_process(who: str, checkpointed: bool, dtype: str, folder: str, steps: int) -> dict[str, Any]:
    arm = json.dumps([who, checkpointed, dtype, folder, steps])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, __file__, "--arm", arm], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{arm} ended with exit code {done.returncode}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(dtype: str, rounds: int, steps: int) -> list[dict[str, Any]]:
    """A row for each arm: medians over all rounds, and ratios to the peer's arm of the same kind."""
    from models import load_model, save_model

    found: dict[tuple[str, bool], list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        save_model(load_model("smollm2-135m"), f"{folder}/base")
        for _ in range(rounds):
            for arm in ARMS:
                found[arm].append(in_a_process(*arm, dtype, f"{folder}/base", steps))
    losses = [runs[0]["first_loss"] for runs in found.values()]
    tolerance = 1e-3 if dtype == "fp32" else 2e-2
    if max(losses) - min(losses) > tolerance * losses[0]:
        raise ValueError(f"the arms' first losses must agree within {tolerance:.0e}, got {losses}")
    rows = [summary(arm, runs, dtype) for arm, runs in found.items()]
    for row in rows:
        theirs = next(r for r in rows if r["arm"] == PEER and r["checkpointed"] == row["checkpointed"])
        row["speed_ratio"] = round(row["tokens_per_second"] / theirs["tokens_per_second"], 2)
        row["memory_ratio"] = round(row["peak_process_bytes"] / theirs["peak_process_bytes"], 2)
    return rows


def summary(arm: tuple[str, bool], runs: list[dict[str, Any]], dtype: str) -> dict[str, Any]:
    speeds = sorted(ROWS * TOKENS / s for run in runs for s in run["seconds"])
    p20, p80 = (speeds[round(q * (len(speeds) - 1))] for q in (0.2, 0.8))
    return {
        "arm": "qlora-anatomy" if arm[0] == "ours" else PEER,
        "peer_versions": ", ".join(f"{name} {version(name)}" for name in ("transformers", "peft", "bitsandbytes")),
        "dtype": dtype,
        "checkpointed": arm[1],
        "rows": ROWS,
        "tokens": TOKENS,
        "r": RANK,
        "tokens_per_second": round(statistics.median(speeds), 1),
        "p20": round(p20, 1),
        "p80": round(p80, 1),
        "peak_process_bytes": int(statistics.median(run["peak_process_bytes"] for run in runs)),
        "live_tensor_bytes": int(statistics.median(run["live_tensor_bytes"] for run in runs)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each arm in each round")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(measure(*json.loads(args.arm))))
        return
    write_rows("train_step", compare(args.dtype, args.rounds, args.steps), key="dtype")


if __name__ == "__main__":
    main()
