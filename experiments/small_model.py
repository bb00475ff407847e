"""A small decoder over bytes, trained here on the Python reference: weights that no format has ever rounded.

3.4 million parameters, 4 layers of width 256, some minutes on two cores. Kept in runs/experiments/small_model.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lora import trainable_parameters
from models import Decoder, DecoderConfig, load_model, save_model
from optim import PagedAdamW, learning_rate
from trainers.logprobs import per_token_nll
from trainers.loop import train_step

from .text import reference, rows_of

FOLDER = Path("runs/experiments/small_model")
CONFIG = DecoderConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
)
LENGTH, BATCH, STEPS, RATE = 128, 16, 600, 2e-3


def split() -> tuple[list[list[int]], list[list[int]]]:
    """(training rows, held-out rows) of bytes: the last tenth of the text is held out."""
    text = reference().encode()
    cut = len(text) * 9 // 10
    return rows_of(text[:cut], LENGTH), rows_of(text[cut:], LENGTH, 64)


def small_model(folder: Path = FOLDER, steps: int = STEPS) -> Decoder:
    """The trained model, from its folder, or trained now (seed 0) and kept there."""
    if not (folder / "config.json").is_file():
        save_model(trained(steps), folder)
    return load_model(folder, dtype=torch.float32)


def untrained() -> Decoder:
    """One layer of random weights: for trials."""
    torch.manual_seed(0)
    return Decoder(replace(CONFIG, num_hidden_layers=1)).eval()


def trained(steps: int) -> Decoder:
    """A new model that has read the reference."""
    torch.manual_seed(0)
    model = Decoder(CONFIG)
    fit(model, split()[0], steps=steps, batch_size=BATCH, rate=RATE)
    return model.eval()


def fit(
    model: Decoder,
    rows: list[list[int]],
    *,
    steps: int,
    batch_size: int,
    rate: float,
    generator: torch.Generator | None = None,
) -> None:
    """Next-byte prediction by what requires a gradient: AdamW, 5% warm-up, cosine, clipped at 1.

    generator draws the rows, torch's own where none is given. Raises ValueError when a loss or gradient is not
    finite (trainers/loop.py).
    """
    ids, parameters = torch.tensor(rows), trainable_parameters(model.train())
    optimizer = PagedAdamW([parameter for _, parameter in parameters], lr=rate)

    def loss_of(batch: Tensor) -> Tensor:
        ones = torch.ones_like(batch)
        return per_token_nll(model, batch, ones, ones).mean()

    for step in range(steps):
        batch = ids[torch.randint(len(ids), (batch_size,), generator=generator)]
        now = learning_rate(step, total_steps=steps, peak=rate, warmup_steps=steps // 20, schedule="cosine")
        train_step([batch], loss_of, parameters, optimizer, learning_rate=now, max_grad_norm=1.0)
