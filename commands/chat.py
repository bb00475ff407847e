"""qlora chat: a conversation in the terminal. /clear starts again, /exit or the end of input leaves."""

from dataclasses import dataclass

from data.encode import encode_prompt
from models import generate

from .generate import SamplingArgs, TextStream
from .loaded import load


@dataclass(frozen=True)
class ChatArgs(SamplingArgs):
    """Talk with a model; answers stream. /clear starts again, /exit leaves."""


def run(args: ChatArgs) -> None:
    model, tokenizer = load(args)
    start = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages = list(start)
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            print()
            return
        if said == "/exit":
            return
        if said == "/clear":
            messages = list(start)
        elif said:
            messages.append({"role": "user", "content": said})
            stream = TextStream(tokenizer)
            prompt = encode_prompt(tokenizer, messages)
            [completion] = generate(model, [prompt], stop_ids=tokenizer.eos_ids, on_token=stream, **args.options())
            print()
            answer = tokenizer.decode(completion.ids, skip_special_tokens=True)
            messages.append({"role": "assistant", "content": answer.strip()})  # a template writes its own spaces
