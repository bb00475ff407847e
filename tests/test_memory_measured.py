"""The planner's total within 10 % of the measured peak of live tensor bytes in an update of the real trainers."""

import resource

import pytest
import torch

from models import DecoderConfig
from trainers.memory import Setup, plan

from .live_memory import measure

MODEL = DecoderConfig(2048, 192, 512, 6, 6, 2, 32, 2048)
OTHER = DecoderConfig(3000, 128, 320, 4, 4, 4, 32, 2048, tie_word_embeddings=True)
SHORT = {"accumulation": 1, "sequence_length": 128}
GRPO = {"trainer": "grpo", "max_completion_length": 24, "batch_size": 8, "beta": 0.0}
CASES = {
    "qlora": {"batch_size": 4},
    "qlora, short": {"batch_size": 1, "sequence_length": 32},
    "qlora, other model": {"batch_size": 8},
    "qlora, accumulated": {"batch_size": 2, "accumulation": 4},
    "qlora, checkpointing": {"gradient_checkpointing": True},
    "qlora, bf16": {"dtype": "bf16"},
    "qlora, bf16, checkpointing": {"dtype": "bf16", "gradient_checkpointing": True},
    "lora, other model, bf16": {"method": "lora", "dtype": "bf16", "batch_size": 8},
    "qlora dpo, bf16": {"trainer": "dpo", "batch_size": 2, "dtype": "bf16"},
    "qlora grpo, bf16": {**GRPO, "dtype": "bf16"},
    "lora": {"method": "lora"},
    "lora, other model, 8 bits": {"method": "lora", "optimizer": "paged_adamw_8bit", "sequence_length": 256},
    "full": {"method": "full"},
    "full, bf16, torch's AdamW": {"method": "full", "dtype": "bf16", "optimizer": "adamw"},
    "full, one short row": {"method": "full", "batch_size": 1, "sequence_length": 32, "optimizer": "adamw"},
    "qlora dpo": {"trainer": "dpo", "batch_size": 2},
    "full dpo": {"trainer": "dpo", "method": "full", "precompute_ref": True, "batch_size": 1},
    "lora orpo, other model": {"trainer": "orpo", "method": "lora", "batch_size": 2},
    "qlora distill": {"trainer": "distill", "teacher": MODEL, "batch_size": 2},
    "lora distill": {"trainer": "distill", "teacher": MODEL, "method": "lora", "sequence_length": 256},
    "qlora grpo": GRPO,
    "lora grpo, accumulated": {**GRPO, "method": "lora", "accumulation": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_total_is_within_10_percent(name: str, record_property) -> None:
    config, setup = OTHER if "other" in name else MODEL, Setup(**SHORT | CASES[name])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        measured = measure(config, setup).peak
    finally:
        torch.set_num_threads(threads)
    total = plan(config, setup).total
    record_property("plan / measured", round(total / measured, 3))
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{name}: plan {total:,}, live {measured:,} ({total / measured:.3f}); process {process / total:.1f} × plan")
    assert total == pytest.approx(measured, rel=0.1)
