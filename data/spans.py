"""Which characters of a rendered conversation came from its messages, and which of them are the answers.

A template is a black box: it may trim a content, move it, repeat it, or write text around it. So the conversation is
rendered a second time with a mark before and after each content:

    plain     <|im_start|>user⏎Hello<|im_end|>⏎
    marked    <|im_start|>user⏎«Hello»<|im_end|>⏎       « and » are characters of Unicode's private planes 15 and 16

Taking the marks out must give back exactly the plain text; then their places are the contents' places. The marks stand
inside a content's outer white space, so that a template that trims gives the same text with and without them.

A message's other texts (an instruction and an input beside its content) are marked like a content.

An answer starts where generation would start: after the text of the messages before it with the generation prompt, if
the conversation begins with that text (a template may write "<think>" on one side of it: the model learns what it will
be asked for), otherwise where its content starts. It stops where its content stops. A template that knows no generation
prompt gets one: its text up to where an answer's content would start.

A template that changes contents (the marks do not come back) leaves one way: an answer is what each further answer adds
to the text. If the text before it changes as well, the place of the answer is unknown and that is a ValueError.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .chat import Message

Span = tuple[int, int]
Text = tuple[int, str]  # a message's number from 0, and which of its texts
Render = Callable[..., str]  # (messages, add_generation_prompt=False) → text

FIRST_OPEN, FIRST_CLOSE = 0xF0000, 0x100000
MAX_MARKS = 0xFFFD
PROBE = chr(FIRST_OPEN + MAX_MARKS)
MARK = re.compile("[\U000f0000-\U0010ffff]")


@dataclass(frozen=True)
class Rendering:
    """A conversation as text, with the places (start, stop) of its contents and of its answers, in order."""

    text: str
    contents: list[Span]
    answers: dict[int, Span]  # by the number of the message, from 0; one that the template drops has no place
    unplaced: list[int]  # the messages whose content could not be placed: they may hold no special token's text


def locate(
    render: Render, messages: Sequence[Message], end_token: re.Pattern[str], *, add_generation_prompt: bool = False
) -> Rendering:
    """Render `messages` and find contents and answers. `end_token` matches white space and a special token.

    Raises ValueError when the template refuses the messages or rewrites them so that an answer cannot be placed.
    """
    text = generation_text(render, messages) if add_generation_prompt else render(messages)
    texts = [(i, field) for i, message in enumerate(messages) for field in message if field != "role"]
    places = _marked_places(render, messages, texts, text, add_generation_prompt)
    if places is None:
        answers = {i: _added_by(render, messages, i, text, end_token) for i in _answers(messages)}
        return Rendering(text, [], answers, unplaced=list(range(len(messages))))
    contents, unplaced = [], []
    for (i, _), (opens, closes) in places.items():
        if len(opens) == len(closes) and all(start < stop for start, stop in zip(opens, closes, strict=True)):
            contents += list(zip(opens, closes, strict=True))
        else:
            unplaced.append(i)
    shown = [i for i in _answers(messages) if (i, "content") in places]
    answers = {i: _answer(render, messages, i, text, *places[i, "content"]) for i in shown}
    return Rendering(text, sorted(contents), answers, unplaced)


def generation_text(render: Render, messages: Sequence[Message]) -> str:
    """The text that generation starts from."""
    text = render(messages, add_generation_prompt=True)
    if text != render(messages):
        return text
    before, probe, _ = render([*messages, {"role": "assistant", "content": PROBE}]).partition(PROBE)
    # white space alone is left for the model to write, as in Llama 2's "[/INST] answer": tokens carry it in front
    return before if probe and before.startswith(text) and before.strip() != text.strip() else text


def _answers(messages: Sequence[Message]) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def _marked_places(
    render: Render, messages: Sequence[Message], texts: list[Text], text: str, add_generation_prompt: bool
) -> dict[Text, tuple[list[int], list[int]]] | None:
    """For each of `texts` that shows: where it opens and where it closes. None when marks cannot be used."""
    if MARK.search(text) or len(texts) > MAX_MARKS:
        return None
    marked_messages = [dict(message) for message in messages]
    for number, (i, field) in enumerate(texts):
        marked_messages[i][field] = _mark(messages[i][field], number)
    marked = generation_text(render, marked_messages) if add_generation_prompt else render(marked_messages)
    if MARK.sub("", marked) != text:
        return None
    places: dict[Text, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for removed, match in enumerate(MARK.finditer(marked)):
        mark = ord(match[0])
        position = match.start() - removed
        if mark >= FIRST_CLOSE:
            places[texts[mark - FIRST_CLOSE]][1].append(position)
        else:
            places[texts[mark - FIRST_OPEN]][0].append(position)
    return places


def _mark(content: str, i: int) -> str:
    core = content.strip()
    start = content.find(core)
    if not core:
        return content  # marks would make an empty content look full to the template
    return content[:start] + chr(FIRST_OPEN + i) + core + chr(FIRST_CLOSE + i) + content[start + len(core) :]


def _answer(
    render: Render, messages: Sequence[Message], i: int, text: str, opens: list[int], closes: list[int]
) -> Span:
    """The place of answer `i`, which shows once. Its start may be missing: a template may cut "<think>" off."""
    prompt = generation_text(render, messages[:i])
    starts = [len(prompt)] if text.startswith(prompt) else opens
    if len(closes) != 1 or len(opens) > 1 or opens > closes or not starts or starts > closes:
        raise ValueError(f"the chat template rewrites message {i + 1}: where its answer stands cannot be told")
    start, stop = starts[0], closes[0]
    content = messages[i]["content"]
    for tail in content[len(content.rstrip()) :]:  # white space after the answer, as far as the template kept it
        if text[stop : stop + 1] != tail:
            break
        stop += 1
    return start, stop


def _added_by(render: Render, messages: Sequence[Message], i: int, text: str, end_token: re.Pattern[str]) -> Span:
    """The place of answer `i` as what it adds to the text of the messages before it."""
    prompt = render(messages[:i], add_generation_prompt=True)
    through = render(messages[: i + 1])
    if not (text.startswith(through) and through.startswith(prompt)):
        raise ValueError(f"the chat template rewrites message {i + 1}: where its answer stands cannot be told")
    stop = len(through.rstrip())
    for match in end_token.finditer(through, len(prompt)):
        if match.end() == stop:
            stop = match.start()
            break
    return len(prompt), stop
