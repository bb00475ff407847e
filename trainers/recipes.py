"""Defaults by method, each with where it comes from. A flag given by the user always wins.

| knob | full | LoRA, QLoRA | source |
|---|---|---|---|
| learning rate | 2e-5 | 2e-4 | TRL's SFT default; QLoRA (arXiv 2305.14314) for 7B and 13B, Unsloth's guide |
| r, alpha, targets | - | 16, 16, all linear layers | Unsloth's guide; QLoRA fig. 2 for the targets |
| dropout | - | 0 | Unsloth's guide (QLoRA used 0.1 up to 13B) |
| schedule, warm-up | cosine, 5% | cosine, 5% | Unsloth's guide (QLoRA: constant, 3%) |
| weight decay | 0.01 | 0.01 | torch.optim.AdamW, Unsloth's guide (QLoRA: 0) |
| clipping | 1.0 | 1.0 | transformers' default (QLoRA: 0.3) |
| rows an update | 16 | 16 | QLoRA's scripts |
"""

METHODS = ("full", "lora", "qlora")

LEARNING_RATE = {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4}


def default_learning_rate(method: str) -> float:
    """The peak rate of SFT by `method`. Raises ValueError for another method."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return LEARNING_RATE[method]
