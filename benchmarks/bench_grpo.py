"""One GRPO iteration of SmolLM2-135M in 4 bits, ours beside TRL's GRPOTrainer with peft and bitsandbytes.

    8 prompts (about 40 tokens) × 8 completions of 64 tokens, one update, r = 16 on all linear layers, fp32, no KL

Both sample at temperature 1, score, and update, from the same weights and prompts; every completion has all 64 tokens,
since neither side may end one (a random end would be another amount of work each time). The reward, a number made of a
completion's tokens, has spread in every group, so that none is left out. Every arm runs in a process of its own, in
turns. Columns of the CSV:

    seconds             of the iterations after the first: sampling, rewards, forward, backward, optimizer
    peak_process_bytes  peak resident memory of the process, Python, libraries and loading included

`--forward` is how many completions a forward of training holds, the same on both sides; TRL's own default is 8. TRL
also runs with all completions in one forward, its plainest form of one update; the gradient is the same.
`time_ratio` and `memory_ratio` are over TRL's at `--forward`, `…_whole` over TRL's with all in one.
TRL samples in train mode, where bitsandbytes multiplies in fp32, as ours does (benchmarks/bench_decode.py).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.results import write_rows  # noqa: E402  # after the path

RANK = 16
PEER = "TRL + peft + bitsandbytes"
QUESTION = "Write about the number {}, and do not stop."


class Case(NamedTuple):
    prompts: int
    generations: int
    tokens: int
    forward: int
    """completions in one forward of training"""

    @property
    def forwards(self) -> int:
        return self.prompts * self.generations // self.forward


def number_of(ids: list[int]) -> float:
    """A reward that differs within every group."""
    return sum(ids) % 997 / 997


def our_reward(answers: Any) -> list[float]:
    return [number_of(answer.ids) for answer in answers]


def rows(case: Case) -> list[dict[str, str]]:
    return [{"prompt": QUESTION.format(n), "completion": "-"} for n in range(10, 10 + 4 * case.prompts)]


def ours(folder: Path, case: Case, iterations: int) -> list[float]:
    """Seconds of each iteration after the first."""
    from trainers import grpo, rollout
    from trainers.metrics import read_metrics

    generate = rollout.generate
    rollout.generate = lambda *prompts, **flags: generate(*prompts, **flags | {"stop_ids": ()})  # none may end
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(case)), encoding="utf-8")
    config = grpo.GRPOConfig(
        data=str(data),
        out=str(folder / "run"),
        rewards=["benchmarks.bench_grpo:our_reward"],
        recipe="grpo",
        beta=0.0,
        r=RANK,
        num_generations=case.generations,
        max_completion_length=case.tokens,
        batch_size=case.forward,
        accumulation=case.forwards,
        max_steps=1 + iterations,
        optimizer="adamw",
        samples=0,
    )
    grpo.train(config, quiet=True)
    lines = read_metrics(folder / "run" / "metrics.jsonl")
    shortest = min(line["completions/min_length"] for line in lines)
    if shortest != case.tokens or any(line["frac_reward_zero_std"] for line in lines):
        raise ValueError(f"every completion must have {case.tokens} tokens and every group spread, got {lines}")
    clock = [line["seconds"] for line in lines]
    return [after - before for before, after in pairwise(clock)]


def peer(folder: Path, case: Case, iterations: int) -> list[float]:
    """The same of TRL, from the same weights in folder/base."""
    import torch
    import transformers
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    transformers.logging.set_verbosity_error()
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = str(folder / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=four_bits, device_map="cpu"
    )
    started: list[float] = []
    ended: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            started.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ended.append(time.perf_counter())

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        if {len(ids) for ids in completion_ids} != {case.tokens}:
            raise ValueError(f"every completion must have {case.tokens} tokens")
        return [number_of(ids) for ids in completion_ids]

    arguments = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=case.forward,
        gradient_accumulation_steps=case.forwards,
        num_generations=case.generations,
        max_completion_length=case.tokens,
        generation_kwargs={"min_new_tokens": case.tokens},
        loss_type="grpo",
        beta=0.0,
        max_steps=1 + iterations,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        logging_steps=1000,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows(case)]
        ),
        processing_class=transformers.AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    trainer.train()
    return [end - start for start, end in zip(started, ended, strict=True)][1:]


def measure(who: str, folder: str, case: list[int], iterations: int) -> dict[str, Any]:
    """One arm, in this process."""
    from trainers.metrics import peak_memory_bytes

    seconds = (ours if who == "ours" else peer)(Path(folder), Case(*case), iterations)
    return {"seconds": seconds, "peak_process_bytes": peak_memory_bytes()}


def in_a_process(who: str, base: Path, case: Case, iterations: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(base, Path(folder) / "base")
        arm = json.dumps([who, folder, case, iterations])
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            [sys.executable, __file__, "--arm", arm], capture_output=True, text=True, check=False, env=environment
        )
    if done.returncode:
        raise RuntimeError(f"{arm} ended with exit code {done.returncode}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(arms: list[tuple[str, Case]], rounds: int, iterations: int) -> list[dict[str, Any]]:
    """A row for each arm: the median over all rounds, and ratios to the peer's where it ran."""
    from models import load_model, load_tokenizer, save_model

    found: dict[tuple[str, Case], list[dict[str, Any]]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        save_model(load_model("smollm2-135m"), base, tokenizer=load_tokenizer("smollm2-135m"))
        for _ in range(rounds):
            for who, case in arms:
                found[who, case].append(in_a_process(who, base, case, iterations))
    rows = [summary(*arm, runs) for arm, runs in found.items()]
    theirs = [row for row in rows if row["arm"] == PEER]
    for row in rows:
        row |= {"time_ratio": "", "memory_ratio": "", "time_ratio_whole": "", "memory_ratio_whole": ""}
        for peer_row, suffix in zip(theirs, ("", "_whole"), strict=False):
            row[f"time_ratio{suffix}"] = round(row["seconds"] / peer_row["seconds"], 3)
            row[f"memory_ratio{suffix}"] = round(row["peak_process_bytes"] / peer_row["peak_process_bytes"], 3)
    return rows


def summary(who: str, case: Case, runs: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = sorted(s for run in runs for s in run["seconds"])
    p20, p80 = (seconds[round(q * (len(seconds) - 1))] for q in (0.2, 0.8))
    return {
        "key": "/".join(map(str, (who, *case))),
        "arm": "qlora-anatomy" if who == "ours" else PEER,
        "peer_versions": ", ".join(f"{name} {version(name)}" for name in ("trl", "peft", "bitsandbytes")),
        "prompts": case.prompts,
        "generations": case.generations,
        "tokens": case.tokens,
        "r": RANK,
        "completions_a_forward": case.forward,
        "seconds": round(statistics.median(seconds), 2),
        "p20": round(p20, 2),
        "p80": round(p80, 2),
        "peak_process_bytes": int(statistics.median(run["peak_process_bytes"] for run in runs)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=("ours", "peer"), default=["ours", "peer"])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--generations", type=int, default=8, help="completions of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of each completion")
    parser.add_argument("--forward", type=int, default=8, help="completions in one forward of training")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=1, help="timed iterations of each arm in each round")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(measure(*json.loads(args.arm))))
        return
    case = Case(args.prompts, args.generations, args.tokens, args.forward)
    whole = case._replace(forward=case.prompts * case.generations)
    arms = [("ours", case)] if "ours" in args.arms else []
    arms += [("peer", case), ("peer", whole)] if "peer" in args.arms else []
    write_rows("grpo", compare(list(dict.fromkeys(arms)), args.rounds, args.iterations), key="key")


if __name__ == "__main__":
    main()
