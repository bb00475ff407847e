"""Single-turn rows, merged at random into conversations of several turns: a model learns to answer again.

    reuse    N rows make N conversations of n turns. Every row stands once in each turn's place, so that it is used n
             times an epoch, as in Unsloth's conversation_extension; here no conversation holds a row twice
    once     N rows make ⌈N / n⌉ conversations, and every row is used once; the last may be shorter

With reuse, conversation i is row p(i) and the rows at distances d₁ … dₙ₋₁ after it in one random circle p of all rows;
the distances are different and random. So each conversation is n different rows, each choice as likely as any other.
The merge is a function of (number of rows, turns, seed): every epoch has the same conversations.
"""

from collections.abc import Sequence

from .chat import Message
from .split import shuffled

MAX_TURNS = 100


def merge_turns(
    conversations: Sequence[Sequence[Message]], turns: int, seed: int, *, reuse: bool, path: str
) -> list[list[Message]]:
    """Conversations of one turn (system?, user, assistant) → conversations of `turns` turns.

    A system message is kept once, in front. Raises ValueError for turns outside 1 … MAX_TURNS, for fewer rows than
    turns, for a row of several turns, and for rows whose system messages differ.
    """
    if not 1 <= turns <= MAX_TURNS:
        raise ValueError(f"--turns must lie between 1 and {MAX_TURNS}, got {turns}")
    if len(conversations) < turns:
        raise ValueError(f"{path}: {turns} turns need at least {turns} different rows, there are {len(conversations)}")
    _check_single(conversations, path)
    groups = _with_reuse(len(conversations), turns, seed) if reuse else _once(len(conversations), turns, seed)
    return [_joined([conversations[i] for i in group]) for group in groups]


def _with_reuse(n: int, turns: int, seed: int) -> list[list[int]]:
    circle = shuffled(n, seed, "conversations")
    distances = [0] + [1 + distance for distance in shuffled(n - 1, seed, "distances")[: turns - 1]]
    groups = [[circle[(i + distance) % n] for distance in distances] for i in range(n)]
    return sorted(groups)  # conversation i begins with row i


def _once(n: int, turns: int, seed: int) -> list[list[int]]:
    order = shuffled(n, seed, "conversations")
    return [order[start : start + turns] for start in range(0, n, turns)]


def _check_single(conversations: Sequence[Sequence[Message]], path: str) -> None:
    first_system = _system(conversations[0])
    for number, messages in enumerate(conversations, start=1):
        turns = sum(message["role"] == "assistant" for message in messages)
        if turns != 1:
            raise ValueError(f"{path}: row {number} has {turns} turns; --turns merges rows of one turn")
        if _system(messages) != first_system:
            raise ValueError(
                f"{path}: row {number} has another system message than row 1; rows of one conversation must share it"
            )


def _system(messages: Sequence[Message]) -> str | None:
    return messages[0]["content"] if messages[0]["role"] == "system" else None


def _joined(parts: Sequence[Sequence[Message]]) -> list[Message]:
    return [*parts[0], *(message for part in parts[1:] for message in part if message["role"] != "system")]
