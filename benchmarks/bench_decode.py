"""Greedy decoding of SmolLM2-135M in NF4: ours beside transformers + bitsandbytes, at several batch sizes.

    prompts of 40 tokens (the demo's task), 64 new tokens each, no stop token, fp32 activations but where bf16 is said

Arms take turns in one process, from the same 4-bit codes. In eval mode and on processors with AVX512-BF16, bitsandbytes
repacks its weights and multiplies in bf16, whatever its compute dtype says; in train mode it multiplies in fp32. Ours
multiplies in the model's dtype. All are timed. Before any time counts, our logits in fp32 must agree with the peer's in
fp32; `same` then says how many completions are its to the last id. Where llama-cpp-python is installed, llama.cpp
decodes one prompt too, from the GGUF file as it is: the same model in other 4 bits (Q4_1). Columns of the CSV:

    tokens_per_second   of decoding: all rows' tokens after their first, over the time from the first to the last
    prefill_ms          from the call to the first tokens
    head_kl, head_top   of a head in fewer bits against the dense one, over the same hidden states (prompts with their
                        greedy completions): mean KL in nats, share of positions with the same likeliest token
    ratio, ratio_fp32   tokens_per_second over that of the peer as it comes, and in fp32, in the same round: median
    ratio_llama         the same over llama.cpp's, where it ran
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # after the path, as the repository's packages below

from benchmarks.results import write_rows
from data.chat import question
from data.encode import encode_prompt
from data.tasks import make_split
from kernels import describe_backends
from lora import LoRAConfig, add_adapter, merge_adapter
from models import Decoder, generate, load_model, load_tokenizer, save_model
from models.builtin import builtin_path

MODEL, PROMPT, RANK = "smollm2-135m", 40, 16
PEER, PEER_FP32 = "transformers + bitsandbytes", "transformers + bitsandbytes, in fp32"
LLAMA = "llama.cpp"
PEERS = {"transformers": "transformers", "bitsandbytes": "bitsandbytes", "llama_cpp": "llama-cpp-python"}
"""Module → package: those that are installed are named in every row."""
Ids = list[list[int]]
Run = Callable[[Ids, int], tuple[Ids, list[float]]]
"""(prompts, new tokens) → completions, and the time at which each token of the first row came"""


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--batches", default="1,8,32")
    flags.add_argument("--tokens", type=int, default=64, help="new tokens a prompt")
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--no-peer", action="store_true", help="leave transformers and bitsandbytes out")
    args = flags.parse_args()
    arms = ours()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        models: dict[str, Run] = {name: our_run(model) for name, model in arms.items()}
        if not args.no_peer:
            theirs = {PEER: peer(folder).eval(), PEER_FP32: peer(folder).train()}
            gate(arms["ours"], theirs[PEER_FP32])
            models = {name: peer_run(model) for name, model in theirs.items()} | models
        rows = []
        for batch in map(int, args.batches.split(",")):
            also = {LLAMA: llama_run()} if batch == 1 and not args.no_peer and find_spec("llama_cpp") else {}
            rows += compare(models | also, prompts(batch), args.tokens, args.rounds)
        found = head_quality(arms, prompts(32), args.tokens)
    rows = [row | found.get(row["arm"], {"head_kl": "", "head_top": ""}) for row in rows]
    write_rows("decode", rows, key="key")


def prompts(batch: int) -> Ids:
    """The first 40 tokens of the demo's task, `batch` messages of it."""
    tokenizer = load_tokenizer(MODEL)
    rows = make_split("train", 4 * batch, seed=0)
    encoded = [encode_prompt(tokenizer, [question(row["instruction"], row["input"])]) for row in rows]
    distinct = {tuple(ids[-PROMPT:]): None for ids in encoded if len(ids) >= PROMPT}
    return [list(ids) for ids in distinct][:batch]


def ours() -> dict[str, Decoder]:
    def loaded(head: str | None = None, dtype: torch.dtype = torch.float32) -> Decoder:
        return load_model(MODEL, dtype=dtype, quantize="nf4", head=head)

    def adapted(seed: int = 0) -> Decoder:
        model = loaded("nf4")
        torch.manual_seed(seed)
        add_adapter(model, LoRAConfig(r=RANK))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        return model

    merged = adapted()
    merge_adapter(merged, into="nf4")
    return {
        "ours": loaded(),
        "ours, head in bf16": loaded("bf16"),
        "ours, head in NF4": loaded("nf4"),
        "ours, head in NF4, adapter": adapted(),
        "ours, head in NF4, adapter merged": merged,
        "ours, all in bf16": loaded(dtype=torch.bfloat16),
        "ours, in bf16, head in NF4": loaded("nf4", torch.bfloat16),
    }


def peer(folder: str) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    save_model(load_model(MODEL, dtype=torch.float32, quantize="nf4"), f"{folder}/base")  # our codes: same weights
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.float32, device_map="cpu")
    model.generation_config = transformers.GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    return model


def our_run(model: Decoder) -> Run:
    def run(prompts: Ids, n: int) -> tuple[Ids, list[float]]:
        times: list[float] = []
        told = lambda row, _: times.append(time.perf_counter()) if row == 0 else None  # noqa: E731
        completions = generate(model, prompts, max_new_tokens=n, on_token=told)
        return [completion.ids for completion in completions], times

    return run


def peer_run(model: Any) -> Run:
    def run(prompts: Ids, n: int) -> tuple[Ids, list[float]]:
        times: list[float] = []

        def told(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        ids = torch.tensor(prompts)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, stopping_criteria=[told])
        return out[:, ids.shape[1] :].tolist(), times

    return run


def llama_run() -> Run:
    """llama.cpp over the GGUF file of the built-in model, for one prompt."""
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    model = Llama(str(builtin_path(MODEL)), n_threads=threads, n_threads_batch=threads, n_ctx=512, verbose=False)

    def run(prompts: Ids, n: int) -> tuple[Ids, list[float]]:
        (prompt,), ids, times = prompts, [], []
        model.reset()  # else it keeps the keys and values of the prompt
        for token in model.generate(prompt, temp=0.0):
            times.append(time.perf_counter())
            ids.append(token)
            if len(ids) == n:
                break
        return [ids], times

    return run


def gate(model: Decoder, theirs: Any) -> None:
    """Raises ValueError unless the logits agree, within 1e-3 of their scale: both compute in fp32."""
    ids = torch.tensor(prompts(4))
    found, wanted = model(ids), theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    error = float((found - wanted).abs().max() / wanted.abs().max())
    if not error <= 1e-3:
        raise ValueError(f"our logits differ from the peer's by {error:.1e} of their scale")


def head_quality(arms: dict[str, Decoder], prompts: Ids, n: int) -> dict[str, dict[str, str]]:
    """head_kl and head_top of the arms that differ from "ours" in the head alone."""
    model = arms["ours"]
    whole = [p + c.ids for p, c in zip(prompts, generate(model, prompts, max_new_tokens=n), strict=True)]
    hidden = model(torch.tensor(whole), return_hidden=True).flatten(0, 1)
    wanted = torch.log_softmax(model.logits(hidden), dim=1)
    found = {}
    for name in ("ours, head in bf16", "ours, head in NF4"):
        logps = torch.log_softmax(arms[name].logits(hidden), dim=1)
        kl = (wanted.exp() * (wanted - logps)).sum(dim=1).mean()
        top = (logps.argmax(dim=1) == wanted.argmax(dim=1)).float().mean()
        found[name] = {"head_kl": f"{kl:.2e}", "head_top": f"{top:.4f}"}
    return found


def compare(arms: dict[str, Run], prompts: Ids, n: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each arm at one batch size."""
    speeds: dict[str, list[float]] = {name: [] for name in arms}
    prefills: dict[str, list[float]] = {name: [] for name in arms}
    completions: dict[str, Ids] = {}
    for run in arms.values():
        run(prompts, 3)  # warm up
    for _ in range(rounds):
        for name, run in arms.items():
            start = time.perf_counter()
            completions[name], times = run(prompts, n)
            speeds[name].append(len(prompts) * (len(times) - 1) / (times[-1] - times[0]))
            prefills[name].append(1e3 * (times[0] - start))
    return [row_of(name, len(prompts), n, speeds, prefills[name], completions) for name in arms]


def row_of(
    name: str, batch: int, n: int, speeds: dict[str, list[float]], prefills: list[float], completions: dict[str, Ids]
) -> dict[str, Any]:
    taken = sorted(speeds[name])
    wanted = completions.get(PEER_FP32, completions[name])
    return {
        "key": f"{batch}/{name}",
        "arm": name,
        "peer_versions": ", ".join(f"{p} {version(p)}" for module, p in PEERS.items() if find_spec(module)),
        "backend": describe_backends()["cpu"].partition(":")[0],
        "batch": batch,
        "prompt_tokens": PROMPT,
        "new_tokens": n,
        "tokens_per_second": f"{statistics.median(taken):.1f}",
        "p20": f"{taken[round(0.2 * (len(taken) - 1))]:.1f}",
        "p80": f"{taken[round(0.8 * (len(taken) - 1))]:.1f}",
        "prefill_ms": f"{statistics.median(prefills):.0f}",
        "rounds": len(taken),
        "ratio": ratio(speeds[name], speeds.get(PEER)),
        "ratio_fp32": ratio(speeds[name], speeds.get(PEER_FP32)),
        "ratio_llama": ratio(speeds[name], speeds.get(LLAMA)),
        "same": sum(a == b for a, b in zip(completions[name], wanted, strict=True)),
    }


def ratio(ours: list[float], base: list[float] | None) -> str:
    return f"{statistics.median(a / b for a, b in zip(ours, base, strict=True)):.2f}" if base else ""


if __name__ == "__main__":
    main()
