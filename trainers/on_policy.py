"""Answers that the student samples itself, for a part of the rows (GKD, arXiv 2306.13649, algorithm 1).

    off-policy    the dataset's answer: the student learns to go on from what others wrote
    on-policy     the student's own answer: it learns to go on from what it writes itself, mistakes included

Which rows of an update are sampled is a function of (seed, step, place in the window); what is sampled, of those, the
prompt and the weights. So nothing need be kept, and a resumed run samples the same. (GKD throws one coin for a whole
update; here each row has its own.)
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from data.encode import Encoded
from models import Decoder, generate

STREAM = 2  # of the random numbers of (seed, step): data/order.py has 0 and 1 of (seed, epoch)


def sampled_rows(seed: int, step: int, n: int, fraction: float) -> list[bool]:
    """Which of the n rows of update `step` are on-policy, each with probability `fraction`."""
    key, counter = (np.array(words, dtype=np.uint64) for words in ([seed % 2**64, step], [0, 0, 0, STREAM]))
    draws = np.random.Philox(key=key, counter=counter).random_raw(n)
    return ((draws >> np.uint64(11)) * 2.0**-53 < fraction).tolist()


def prompt_of(example: Encoded) -> list[int]:
    """The ids before the last answer."""
    mask = example.completion_mask
    end = max(i for i, learnt in enumerate(mask) if learnt)
    start = max((i + 1 for i in range(end) if not mask[i]), default=0)
    return example.ids[:start]


def sample_answers(
    model: Decoder,
    examples: Sequence[Encoded],
    *,
    seed: int,
    step: int,
    max_new_tokens: int,
    temperature: float,
    stop_ids: Sequence[int],
) -> list[Encoded]:
    """The examples with answers of the model's own, every token of them learnt."""
    prompts = [prompt_of(example) for example in examples]
    digest = hashlib.blake2b(f"{seed}|{step}".encode(), digest_size=7).digest()
    completions = generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop_ids=stop_ids,
        seed=int.from_bytes(digest, "little"),
    )
    return [
        Encoded([*prompt, *completion.ids], [0] * len(prompt) + [1] * len(completion.ids))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
