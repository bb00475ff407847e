"""An encoded example in colour: what the model reads, what it learns, and the special tokens between.

dim     context: read, not learnt          ⏎ a newline   ⇥ a tab   other control characters as their pictures
green   learnt: counts in the loss         bold: a special token
"""

from itertools import groupby

from rich.text import Text

from .chat import Tokenizer
from .encode import Encoded

LEARNT, CONTEXT = "green", "dim"
VISIBLE = {code: chr(0x2400 + code) for code in range(0x20)} | {0x7F: "␡", ord("\n"): "⏎\n", ord("\t"): "⇥"}


def show(tokenizer: Tokenizer, encoded: Encoded) -> Text:
    """The example's text. Control characters are shown, never sent, so that data cannot steer the terminal."""
    special = set(tokenizer.special_tokens.values())
    pairs = zip(encoded.ids, encoded.completion_mask, strict=True)
    text = Text()
    # a run of one kind is decoded as a whole: a character may be spread over several tokens
    for (learnt, is_special), run in groupby(pairs, key=lambda pair: (pair[1], pair[0] in special)):
        style = LEARNT if learnt else CONTEXT
        decoded = tokenizer.decode([token for token, _ in run])
        text.append(decoded.translate(VISIBLE), style=f"bold {style}" if is_special else style)
    if encoded.n_truncated:
        text.append(f" … {encoded.n_truncated} tokens cut", style="red")
    return text


def legend() -> Text:
    """One line that explains the colours."""
    parts = [("learnt", LEARNT), (" · ", ""), ("context, masked", CONTEXT), (" · ", ""), ("special token", "bold")]
    return Text.assemble(*parts, " · ⏎ newline")
