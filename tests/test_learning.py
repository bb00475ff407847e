"""What the doors let in is learnt: plain text lowers held-out perplexity; merged turns teach answers in any order."""

import json
import math
import random
from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest

from data import DataFlags, encode_dataset, encode_prompt, read_datasets
from models import Decoder, generate, load_model, load_tokenizer
from tests.small_base import write_base
from trainers import sft

WORDS = {
    "who": ["The old fox", "A small child", "My good friend", "The tall judge"],
    "does": ["sees", "likes", "follows", "paints"],
    "what": ["the red house", "a blue boat", "the green hill", "an old clock"],
    "when": ["in the morning", "at noon", "every evening", "on quiet days"],
}
FACTS = {
    "sky": "blue",
    "grass": "green",
    "snow": "white",
    "coal": "black",
    "blood": "red",
    "gold": "yellow",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


def book(seed: int, sentences: int) -> str:
    rng = random.Random(seed)
    return "\n".join(" ".join(rng.choice(choices) for choices in WORDS.values()) + "." for _ in range(sentences))


def train(base: Path, out: Path, **settings: object) -> Decoder:
    config = sft.SFTConfig(
        out=str(out), model=str(base), method="full", schedule="constant", accumulation=1, threads=1, samples=0,
        **settings,
    )  # fmt: skip
    return sft.train(config, quiet=True).model.eval()


def test_continued_pretraining_on_plain_text_lowers_held_out_perplexity(base: Path, tmp_path: Path) -> None:
    """Below the perplexity of the tokens' frequencies, so that what comes before a token is used."""
    for name, seed, sentences in (("train", 1, 150), ("held", 2, 30)):
        (tmp_path / f"{name}.txt").write_text(book(seed, sentences))
    tokenizer = load_tokenizer(base)
    data, held_out = read_datasets(DataFlags(data=str(tmp_path / "train.txt"), eval_data=str(tmp_path / "held.txt")))
    examples = [
        encode_dataset(tokenizer, part.rows, part.schema, max_seq_length=64, path=part.path).examples
        for part in (data, held_out)
    ]

    def perplexity(model: Decoder) -> float:
        return math.exp(sft.evaluate_loss(model, examples[1], 8, tokenizer.pad_id))

    before = perplexity(load_model(base))
    model = train(
        base, tmp_path / "run", data=data.path, max_seq_length=64, max_steps=40, batch_size=8, learning_rate=3e-3
    )
    after = perplexity(model)
    counts = Counter(token for example in examples[0] for token in example.ids)
    held = [token for example in examples[1] for token in example.ids[1:]]
    total = sum(counts.values())
    frequencies = math.exp(-sum(math.log(max(counts[token], 0.5) / total) for token in held) / len(held))
    assert after < frequencies / 2 < before


def test_a_two_turn_dataset_made_by_merging_is_learnt(base: Path, tmp_path: Path) -> None:
    """The trained conversations are answered right in both turns; other pairs of the same rows in most second turns."""
    rows = [{"q": f"The color of {thing}?", "a": f"It is {color}."} for thing, color in FACTS.items()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = {"data": str(tmp_path / "rows.jsonl"), "template": "{q} => {a}", "turns": 2}
    model = train(base, tmp_path / "run", max_steps=70, batch_size=6, learning_rate=3e-3, **told)

    tokenizer = load_tokenizer(base)
    merged, _ = read_datasets(DataFlags(**told))
    trained = [row["messages"] for row in merged.rows]
    turns = [conversation[:2] for conversation in trained]
    unseen = [first + second for first, second in permutations(turns, 2) if first + second not in trained]
    assert (len(trained), len(unseen)) == (6, 24)

    def right(model: Decoder, conversations: list[list[dict[str, str]]]) -> int:
        """How many last answers are given to the letter."""
        prompts = [encode_prompt(tokenizer, messages[:-1]) for messages in conversations]
        completions = generate(model, prompts, max_new_tokens=16, stop_ids=tokenizer.eos_ids)
        said = [tokenizer.decode(completion.ids, skip_special_tokens=True) for completion in completions]
        return sum(got == messages[-1]["content"] for got, messages in zip(said, conversations, strict=True))

    untrained = load_model(base).eval()
    assert [right(untrained, some) for some in (turns, trained, unseen)] == [0, 0, 0]
    assert [right(model, some) for some in (turns, trained)] == [6, 6]
    assert right(model, unseen) > 12  # of 24; a guess among the six answers gives 4
