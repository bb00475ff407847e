"""Half of SmolLM2-135M's layers, taught the demo's task: by distillation, and by the same rows alone.

    teacher        the whole model with a LoRA adapter that has learnt the task (--teacher-steps steps; or --adapter)
    start          its layers 0, 2, 4, … : `qlora shrink`
    fine-tuned     start, after --steps steps of supervised fine-tuning: cross-entropy of the rows' tokens
    distilled      start, after as many steps on the same rows in the same order: KL(teacher ‖ student) at each token

Both students train in full on every token of the rows, questions too, with one rate, schedule and seed. For each:
cross-entropy (loss) and KL(teacher ‖ student) per token of held-out answers, of rows that recombine known words and of
rows whose words and forms training never shows. Everything is ours: no peer.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402  # after the path, as the repository's packages below

from benchmarks.results import write_rows  # noqa: E402
from data import detect, encode_dataset, tasks  # noqa: E402
from models import Decoder, load_model, load_tokenizer, save_model  # noqa: E402
from models.shrink import shrink  # noqa: E402
from trainers import distill, sft  # noqa: E402
from trainers.teacher import LoadedTeacher, load_teacher  # noqa: E402

MODEL = "smollm2-135m"
HELD_OUT = ("recombined", "unseen")


def write_task(folder: Path, rows: int, held_out: int) -> None:
    folder.mkdir(parents=True)
    for split, n in ({"train": rows} | dict.fromkeys(HELD_OUT, held_out)).items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in tasks.make_split(split, n, seed=0)]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def teach_teacher(out: Path, steps: int) -> str:
    """Train the teacher's adapter; returns its folder."""
    config = sft.SFTConfig(
        data=str(out / "data" / "train.jsonl"), out=str(out / "teacher"), model=MODEL, method="lora", max_steps=steps,
        learning_rate=2e-3, batch_size=8, accumulation=1, seed=0, samples=0,
    )  # fmt: skip
    sft.train(config)
    return str(out / "teacher" / "adapter")


def measured(model: Decoder, teacher: LoadedTeacher, out: Path) -> dict[str, str]:
    """loss and KL of every held-out split."""
    tokenizer, found = load_tokenizer(MODEL), {}
    for split in HELD_OUT:
        rows = [json.loads(line) for line in (out / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        examples = encode_dataset(tokenizer, rows, detect(rows, split), max_seq_length=1024, path=split).examples
        numbers = distill.evaluate(model, teacher, examples, 8, tokenizer.pad_id)
        found |= {f"loss_{split}": f"{numbers['eval_loss']:.4f}", f"kl_{split}": f"{numbers['eval_kl']:.4f}"}
    return found


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for the teacher and for each student."""
    out = Path(args.out)
    if out.exists():
        raise ValueError(f"{out} is there already: remove it, or pass another --out")
    write_task(out / "data", args.rows, args.held_out)
    adapter = args.adapter or teach_teacher(out, args.teacher_steps)
    same: dict[str, Any] = {
        "data": str(out / "data" / "train.jsonl"), "model": str(out / "start"), "method": "full", "learn": "everything",
        "max_steps": args.steps, "learning_rate": args.learning_rate, "batch_size": args.batch_size, "accumulation": 1,
        "seed": args.seed, "samples": 0,
    }  # fmt: skip
    config = distill.DistillConfig(
        **same, out=str(out / "distilled"), teacher=MODEL, teacher_adapter=adapter, beta=args.beta
    )
    teacher = load_teacher(config)
    start = shrink(load_model(MODEL, dtype=torch.float32), args.layers)
    save_model(start, config.model, tokenizer=load_tokenizer(MODEL))
    shared = {"layers": args.layers, "steps": args.steps, "learning_rate": args.learning_rate, "seed": args.seed}
    rows = [{"student": "the teacher"} | shared | {"seconds": 0} | measured(teacher.model, teacher, out)]
    rows.append({"student": "start"} | shared | {"seconds": 0} | measured(start.eval(), teacher, out))
    del start
    plain = sft.SFTConfig(**same, out=str(out / "fine-tuned"))
    for name, train in (("fine-tuned", lambda: sft.train(plain)), ("distilled", lambda: distill.train(config))):
        trained = train()
        seconds = round(trained.result.seconds)
        rows.append({"student": name} | shared | {"seconds": seconds} | measured(trained.model, teacher, out))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/bench-distill", help="a new folder")
    parser.add_argument("--adapter", help="the teacher's, for example runs/demo/run/adapter; trained by default")
    parser.add_argument("--teacher-steps", type=int, default=30)
    parser.add_argument("--layers", type=int, default=15)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--held-out", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--beta", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.perf_counter()
    write_rows("distill", compare(args), key="layers")
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
