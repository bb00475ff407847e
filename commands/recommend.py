"""qlora recommend: settings for a model, a dataset and a memory, each with its reason; writes a config.json that runs.

qlora recommend --data rows.jsonl --memory 24 --out runs/mine --write mine.json
qlora sft --config mine.json
"""

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data.dataset import read_datasets
from data.encode import encode_dataset
from data.flags import DataFlags
from models import load_tokenizer
from models.builtin import BUILTIN
from models.well_known import HUB
from trainers.recommend import Recommendation, recommend
from trainers.sft_config import SFTConfig

from .memory import shape_of


@dataclass(frozen=True, kw_only=True)
class RecommendArgs(DataFlags):
    """Settings for supervised fine-tuning, each with its reason and source."""

    memory: float
    """GB (10⁹ bytes) that the run may take."""
    model: str = "smollm2-135m"
    """Well-known name (llama-3.1-8b, …), Hugging Face folder, or hub id."""
    tokenizer: str | None = None
    """Whose tokens the rows are counted in; by default the model's own."""
    out: str = "runs/recommended"
    """The run's folder, in the config that is written."""
    write: str | None = None
    """Write a config for `qlora sft --config` here."""
    on_gpu: bool = False
    """Plan for kernels on a GPU."""


def run(args: RecommendArgs) -> None:
    config, source = shape_of(args.model), source_of(args.model)
    training, _ = read_datasets(args)
    tokenizer = load_tokenizer(args.tokenizer or source)
    context = config.max_position_embeddings
    found = encode_dataset(tokenizer, training.rows, training.schema, max_seq_length=context, path=training.path)
    lengths = [len(example.ids) for example in found.examples]
    advised = recommend(config, lengths, round(args.memory * 1e9), name=args.model, on_gpu=args.on_gpu)
    print(f"data: {training.schema.explanation}; {found.report}")
    Console().print(_table(advised), markup=False)
    planned = advised.plan
    print(f"it takes {planned.total / 1e9:.2f} of {args.memory:g} GB: see qlora memory for what")
    if args.write is not None:
        write_config(args, source, advised, Path(args.write))
        print(f"wrote {args.write}: qlora sft --config {args.write}")


def source_of(model: str) -> str:
    """What --model of a trainer takes for it."""
    return model if model in BUILTIN else HUB.get(model.lower(), model)


def write_config(args: RecommendArgs, source: str, advised: Recommendation, path: Path) -> None:
    """In the shape of a run's config.json."""
    data = {one.name: getattr(args, one.name) for one in fields(DataFlags)}
    config = SFTConfig(**data | advised.flags() | {"model": source, "out": args.out})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({"config": asdict(config)}, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _table(advised: Recommendation) -> Table:
    table = Table("flag", "value", "since", "sources", show_lines=True)
    for one in advised.advice:
        table.add_row("--" + one.flag.replace("_", "-"), str(one.value), one.reason, one.source)
    return table
