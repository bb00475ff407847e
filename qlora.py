"""The front door: the `qlora` command. One row per subcommand; each lives in the module named beside it.

    qlora sft --data rows.jsonl --out runs/first        qlora generate "Why is the sky blue?"
    qlora COMMAND --help                                lists the flags of a command

What a user got wrong is one line on standard error and exit code 2; set QLORA_TRACEBACK=1 to see where it was noticed.
"""

import contextlib
import io
import json
import os
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from quant.imports import check_kernels_import

COMMANDS = {
    "demo": ("commands.demo", "DemoArgs", "fine-tune SmolLM2-135M in 4 bits on a small real task, before and after"),
    "demo dpo": ("commands.demo_preference", "DPODemoArgs", "teach it a preference by DPO, before and after"),
    "demo orpo": ("commands.demo_preference", "ORPODemoArgs", "the same by ORPO"),
    "sft": ("commands.train", "SFTConfig", "supervised fine-tuning: full, LoRA or QLoRA"),
    "dpo": ("commands.dpo", "DPOConfig", "learn from pairs of answers, against a reference: full, LoRA or QLoRA"),
    "orpo": ("commands.orpo", "ORPOConfig", "learn from pairs of answers, without a reference: full, LoRA or QLoRA"),
    "distill": ("commands.distill", "DistillConfig", "teach a student what its teacher predicts, token by token"),
    "grpo": ("commands.grpo", "GRPOConfig", "reinforcement by groups, with rewards: GRPO, DAPO, Dr. GRPO, GSPO"),
    "generate": ("commands.generate", "GenerateArgs", "answer a prompt"),
    "chat": ("commands.chat", "ChatArgs", "talk with a model; answers stream"),
    "probe": ("commands.probe", "ProbeArgs", "can the model do a dataset's task already? Run it on a few rows"),
    "task": ("commands.task", "TaskArgs", "write the rows of a task that comes with this repository"),
    "quantize": ("commands.quantize", "QuantizeArgs", "write a model as a 4-bit folder, in bitsandbytes' format"),
    "merge": (
        "commands.merge",
        "MergeArgs",
        "make an adapter part of its base, dense or in 4 bits, and say what it costs",
    ),
    "combine": ("commands.combine", "CombineArgs", "several adapters of one base into one"),
    "shrink": ("commands.shrink", "ShrinkArgs", "write a model with some of its layers: a student to distil into"),
    "memory": ("commands.memory", "MemoryArgs", "what a run will hold, before it starts; what fits in a card"),
    "recommend": ("commands.recommend", "RecommendArgs", "settings for a model, a dataset and a memory, with reasons"),
    "inspect data": ("commands.inspect_data", "InspectDataArgs", "rows as tokens: what is learnt, what is masked"),
    "inspect model": ("commands.inspect_model", "InspectModelArgs", "the layers of a model and the bytes they hold"),
    "inspect weight": (
        "commands.inspect_weight",
        "InspectWeightArgs",
        "a block of it, from floats to bytes and back",
    ),
    "inspect adapter": (
        "commands.inspect_adapter",
        "InspectAdapterArgs",
        "an adapter's norms, the rank it uses, what merging costs",
    ),
    "inspect run": ("commands.inspect_run", "InspectRunArgs", "how a run went: loss, memory, paging, checkpoints"),
    "experiment": (
        "commands.experiment",
        "ExperimentArgs",
        "try a claim of the papers (docs/experiments)",
    ),
    "grade": ("commands.grade", "GradeArgs", "grade an exercise of the course (lessons)"),
    "bench": ("commands.bench", "BenchArgs", "run a benchmark; `bench backends` says which kernels run here"),
}
BOX = re.compile(r"[╭╮╰╯│]")


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    name = find_command(argv)
    if name is None:
        print(f"qlora: no command {argv[0]!r}: there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        check_kernels_import()
        module_name, arguments, _ = COMMANDS[name]
        module = import_module(module_name)
        module.run(parse(getattr(module, arguments), argv[len(name.split()) :], f"qlora {name}"))
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        if os.environ.get("QLORA_TRACEBACK"):
            raise
        print(f"qlora {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"qlora {name}: {stopped or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


def usage() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {text}" for name, (_, _, text) in COMMANDS.items()]
    return "\n".join(["usage: qlora COMMAND [flags]", "", *rows, "", "qlora COMMAND --help lists a command's flags."])


def find_command(argv: list[str]) -> str | None:
    """The command that argv begins with: one word, or two (inspect data)."""
    for n_words in (2, 1):
        name = " ".join(argv[:n_words])
        if name in COMMANDS:
            return name
    return None


def parse(arguments: type, argv: list[str], prog: str) -> Any:
    """argv as an instance of the dataclass `arguments`; `--config run/config.json` gives other defaults.

    Raises ValueError, in one line, for an unknown flag, a missing one, or a value of the wrong type.
    """
    import tyro

    argv, default = saved_config(arguments, argv)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(arguments, args=argv, prog=prog, **({} if default is None else {"default": default}))
    except SystemExit as stop:
        if not stop.code:
            raise
    said = re.split(r"─{3,} *│?\n", BOX.sub(" ", complaint.getvalue()).strip(), maxsplit=2)
    raise ValueError(" ".join(said[1 if len(said) > 1 else 0].split()))


def saved_config(arguments: type, argv: list[str]) -> tuple[list[str], Any]:
    """argv without `--config FILE`, and the arguments that FILE holds, or None."""
    if "--config" not in argv:
        return argv, None
    at = argv.index("--config")
    if at + 1 == len(argv):
        raise ValueError("--config needs the path of a run's config.json")
    path = Path(argv[at + 1])
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))["config"]
        return argv[:at] + argv[at + 2 :], arguments(**fields)
    except FileNotFoundError:
        raise ValueError(f"--config: there is no file {path}") from None
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"--config: {path} is not a run's config.json: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
