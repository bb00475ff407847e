"""The planner's arithmetic against figures that other frameworks have published, each with its source: within 15 %.

torchtune   README of torchtune: a card's peak in GiB, compiled, chunked cross-entropy, checkpointing, rows of 2048 or
            4096 tokens, two at a time; the Llama-3.2-3B rows are its table of one saving after another
LitGPT      tutorials/quantize.md: Alpaca on an A100, eager, no checkpointing, LoRA on q and v, in GB; inference besides
"""

import pytest

from models.well_known import WELL_KNOWN
from trainers.memory_elsewhere import LITGPT, TORCHTUNE, Framework, Run, total

GIB = 2**30
QV = ("q_proj", "v_proj")
ALPACA = 1304  # tokens of its longest batch there


def litgpt(method: str, double_quant: bool = True) -> Run:
    return Run(method=method, tokens=ALPACA, double_quant=double_quant, targets=QV)


PUBLISHED: list[tuple[str, str, Framework, Run, float]] = [
    ("torchtune QLoRA, 2 × 2048", "llama-3.1-8b", TORCHTUNE,
     Run(method="qlora", tokens=4096, gradient_checkpointing=True), 7.4 * GIB),
    ("torchtune LoRA, 2 × 2048", "llama-3.1-8b", TORCHTUNE,
     Run(method="lora", tokens=4096, gradient_checkpointing=True), 16.2 * GIB),
    ("torchtune full, paged 8-bit AdamW in backward, 2 × 2048", "llama-3.1-8b", TORCHTUNE,
     Run(method="full", tokens=4096, gradient_checkpointing=True, optimizer_in_backward=True, state_bytes=0),
     18.9 * GIB),
    ("torchtune LoRA, 2 × 4096", "llama-3.2-3b", TORCHTUNE,
     Run(method="lora", tokens=8192, gradient_checkpointing=True), 8.5 * GIB),
    ("torchtune full, chunked loss, 2 × 4096", "llama-3.2-3b", TORCHTUNE,
     Run(method="full", tokens=8192), 42.9 * GIB),
    ("torchtune full, and checkpointing", "llama-3.2-3b", TORCHTUNE,
     Run(method="full", tokens=8192, gradient_checkpointing=True), 24.9 * GIB),
    ("torchtune full, and optimizer in backward", "llama-3.2-3b", TORCHTUNE,
     Run(method="full", tokens=8192, gradient_checkpointing=True, optimizer_in_backward=True), 23.1 * GIB),
    ("LitGPT LoRA", "llama-2-7b", LITGPT, litgpt("lora"), 21.30e9),
    ("LitGPT nf4", "llama-2-7b", LITGPT, litgpt("qlora", double_quant=False), 14.14e9),
    ("LitGPT nf4-dq", "llama-2-7b", LITGPT, litgpt("qlora"), 13.84e9),
    ("LitGPT LoRA", "llama-2-13b", LITGPT, litgpt("lora"), 38.12e9),
    ("LitGPT nf4", "llama-2-13b", LITGPT, litgpt("qlora", double_quant=False), 23.14e9),
    ("LitGPT nf4-dq", "llama-2-13b", LITGPT, litgpt("qlora"), 22.55e9),
    ("LitGPT inference nf4", "llama-2-7b", LITGPT, Run(method="qlora", tokens=0, double_quant=False), 4.57e9),
    ("LitGPT inference nf4-dq", "llama-2-7b", LITGPT, Run(method="qlora", tokens=0), 4.26e9),
]  # fmt: skip


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row[1]}: {row[0]}")
def test_within_15_percent_of_published(row: tuple[str, str, Framework, Run, float]) -> None:
    _, model, framework, run, published = row
    assert total(WELL_KNOWN[model], framework, run) == pytest.approx(published, rel=0.15)
