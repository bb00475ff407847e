"""qlora generate: answer one prompt, once or several times."""

import sys
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from data.chat import question
from data.encode import encode_prompt
from models import Tokenizer, generate

from .loaded import ModelArgs, load


@dataclass(frozen=True)
class SamplingArgs(ModelArgs):
    """How to choose the next token."""

    system: str | None = None
    """System message; by default the model's own."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0 always takes the likeliest token; 1 samples from the model's distribution."""
    top_p: float = 1.0
    """Sample only among the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Sample only among this many; 0 is no limit."""
    seed: int = 0
    """Same seed, same answer."""

    def options(self) -> dict[str, Any]:
        """These flags as models.generate's arguments."""
        names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class GenerateArgs(SamplingArgs):
    """Answer a prompt."""

    prompt: Annotated[str, tyro.conf.Positional] = "-"
    """The prompt; - reads it from standard input."""
    input: str | None = None
    """What the prompt is about, where the model learnt rows of an instruction and an input (Alpaca)."""
    num_generations: int = 1
    """How many answers."""
    raw: bool = False
    """Continue the prompt as plain text, without the chat template."""


class TextStream:
    """Prints a row's tokens as they come, as soon as they make whole characters.

    An answer's first space is the template's ("ASSISTANT: Hi") and is not printed; a raw text's is.
    """

    def __init__(self, tokenizer: Tokenizer, raw: bool = False) -> None:
        self.tokenizer, self.raw, self.ids, self.printed = tokenizer, raw, list[int](), 0

    def __call__(self, row: int, token: int) -> None:
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        text = text if self.raw else text.removeprefix(" ")
        if not text.endswith("\ufffd"):  # half of a character: wait for the rest
            sys.stdout.write(text[self.printed :])
            sys.stdout.flush()
            self.printed = len(text)


def run(args: GenerateArgs) -> None:
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt.strip():
        raise ValueError("generate needs a prompt, and this one is empty")
    model, tokenizer = load(args)
    messages = [question(prompt, args.input)]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    ids = tokenizer.encode(prompt) if args.raw else encode_prompt(tokenizer, messages)
    stream = TextStream(tokenizer, args.raw) if args.num_generations == 1 else None
    completions = generate(
        model,
        [ids],
        stop_ids=tokenizer.eos_ids,
        num_generations=args.num_generations,
        on_token=stream,
        **args.options(),
    )
    if stream is not None:
        print()
        return
    for number, completion in enumerate(completions, 1):
        print(f"--- {number}\n{tokenizer.decode(completion.ids, skip_special_tokens=True)}")
