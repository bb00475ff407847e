"""Half of SmolLM2-135M's layers, taught by the whole model: by its predictions, and by its words alone.

    teacher        smollm2-135m, as it is
    rows           the demo's questions, each with an answer that the teacher sampled at temperature 1
    start          the teacher's layers 0, 2, 4, … : `qlora shrink`
    fine-tuned     start, after --steps steps of supervised fine-tuning on the rows: cross-entropy
    distilled      start, after as many steps on the same rows in the same order: KL(teacher ‖ student) at each token

Both students train in full, with one rate, schedule and seed. For each, on held-out rows made the same way, per token
of an answer: cross-entropy (loss) and KL(teacher ‖ student). The teacher wrote the answers, so the loss of a student is
on average the teacher's entropy plus the KL: nearer to the teacher is better at the rows. Everything is ours: no peer.
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
from data import detect, encode_dataset, tasks, to_messages  # noqa: E402
from data.encode import encode_prompt  # noqa: E402
from models import Decoder, Tokenizer, generate, load_model, load_tokenizer, save_model  # noqa: E402
from models.shrink import shrink  # noqa: E402
from trainers import distill, sft  # noqa: E402
from trainers.teacher import LoadedTeacher  # noqa: E402

MODEL = "smollm2-135m"
BATCH = 32


def answered(model: Decoder, tokenizer: Tokenizer, split: str, n: int, max_new_tokens: int) -> list[dict[str, str]]:
    """n questions of a split of the demo's task, with answers that the model samples."""
    rows = tasks.make_split(split, n, seed=0)
    schema = detect(rows, split)
    prompts = [encode_prompt(tokenizer, to_messages(row, schema, split)[:-1]) for row in rows]
    options = {"max_new_tokens": max_new_tokens, "temperature": 1.0, "stop_ids": tokenizer.eos_ids}
    texts = []
    for start in range(0, n, BATCH):
        found = generate(model, prompts[start : start + BATCH], **options)
        texts += [tokenizer.decode(one.ids, skip_special_tokens=True) for one in found]
    return [row | {"output": text} for row, text in zip(rows, texts, strict=True) if text.strip()]


def measured(model: Decoder, teacher: LoadedTeacher, tokenizer: Tokenizer, path: Path) -> dict[str, str]:
    """loss and KL on the held-out rows."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    examples = encode_dataset(tokenizer, rows, detect(rows, str(path)), max_seq_length=1024, path=str(path)).examples
    found = distill.evaluate(model.eval(), teacher, examples, 8, tokenizer.pad_id)
    return {"loss": f"{found['eval_loss']:.4f}", "kl": f"{found['eval_kl']:.4f}"}


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for the teacher and for each student."""
    out, tokenizer = Path(args.out), load_tokenizer(MODEL)
    if out.exists():
        raise ValueError(f"{out} is there already: remove it, or pass another --out")
    out.mkdir(parents=True)
    teacher = LoadedTeacher(load_model(MODEL, dtype=torch.float32))
    for split, n in (("train", args.steps * args.batch_size), ("recombined", args.held_out)):
        rows = answered(teacher.model, tokenizer, split, n, args.max_new_tokens)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (out / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    start = shrink(load_model(MODEL, dtype=torch.float32), args.layers)
    save_model(start, out / "start", tokenizer=tokenizer)

    same: dict[str, Any] = {
        "data": str(out / "train.jsonl"), "model": str(out / "start"), "method": "full", "max_steps": args.steps,
        "learning_rate": args.learning_rate, "batch_size": args.batch_size, "accumulation": 1, "seed": args.seed,
        "samples": 0,
    }  # fmt: skip
    plain = sft.SFTConfig(**same, out=str(out / "fine-tuned"))
    taught = distill.DistillConfig(**same, out=str(out / "distilled"), teacher=MODEL, beta=args.beta)
    held_out = out / "recombined.jsonl"
    shared = {"layers": args.layers, "steps": args.steps, "learning_rate": args.learning_rate, "seed": args.seed}
    rows = [
        {"student": "(the teacher)"} | shared | {"seconds": 0} | measured(teacher.model, teacher, tokenizer, held_out)
    ]
    rows.append({"student": "start"} | shared | {"seconds": 0} | measured(start, teacher, tokenizer, held_out))
    for name, train in (("fine-tuned", lambda: sft.train(plain)), ("distilled", lambda: distill.train(taught))):
        trained = train()
        seconds = round(trained.result.seconds)
        numbers = measured(trained.model, teacher, tokenizer, held_out)
        rows.append({"student": name} | shared | {"seconds": seconds} | numbers)
        print(f"{name}: loss {numbers['loss']}, KL to the teacher {numbers['kl']}, trained in {seconds} s", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/bench-distill", help="a new folder")
    parser.add_argument("--layers", type=int, default=15)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--beta", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.perf_counter()
    write_rows("distill", compare(args), key="layers")
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
