"""Tokenizer: text ↔ token ids, the special tokens, and the chat template, from a model's own files.

    Hugging Face folder    tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja,
                           generation_config.json (which tokens end a turn)
    .gguf file             its metadata (gguf_tokenizer.py)

The work is done by the `tokenizers` library. Byte-level vocabularies give every text back to the byte, if they have a
token for every byte: SmolLM2's lacks six control characters (U+0004, 06, 13, 14, 16, 1D) and the lead bytes F1 and F2
of unassigned planes, which vanish, here as in transformers.

`encode` never adds BOS or EOS: a chat template writes them itself, and adding them twice is a classic mistake;
`adds_bos` tells whoever encodes plain text whether the model expects BOS.

A fine-tuned model is spoken to in the chat template that it was trained with, and stops on the tokens that it learnt to
end with. Both are saved with it, in the files above, also beside an adapter, where PEFT and transformers look for them.
"""

import json
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers

from data.chat import end_of_answer, render, template_of
from data.formats import chat_template

from .config import read_json
from .gguf_format import read_header
from .gguf_tokenizer import gguf_tokenizer_files
from .source import TOKENIZER_FILES, locate


@dataclass(frozen=True)
class TokenizerFiles:
    """What a tokenizer is made of; the keys are Hugging Face's."""

    where: str
    """the file or folder, for errors"""
    tokenizer: dict[str, Any]
    """tokenizer.json"""
    config: dict[str, Any]
    """tokenizer_config.json, with bos_token, eos_token and pad_token as text, without chat_template"""
    chat_template: str | None
    eos_ids: tuple[int, ...]
    """ids that end a turn, beside eos_token"""


def load_tokenizer(source: str | Path) -> "Tokenizer":
    """The tokenizer of a Hugging Face folder, a .gguf file, a hub id or a built-in name.

    Raises ValueError when there is none, when it is damaged, and when its kind is not supported.
    """
    path = locate(source, TOKENIZER_FILES)
    if path.is_dir():
        return Tokenizer(_folder_files(path))
    return Tokenizer(TokenizerFiles(str(path), **gguf_tokenizer_files(read_header(path))))


class Tokenizer:
    """Not safe to share between threads: parse_special is a state of the library's object."""

    def __init__(self, files: TokenizerFiles) -> None:
        self._backend = _backend(files, post_processor=False)
        self.special_tokens: dict[str, int] = {
            token.content: id for id, token in self._backend.get_added_tokens_decoder().items() if token.special
        }
        self.vocab_size = self._backend.get_vocab_size()
        self._take(files)
        self.adds_bos = self.bos_id is not None and self._expects_bos()

    def _take(self, files: TokenizerFiles) -> None:
        """All that follows from the files without the vocabulary. Raises ValueError for a token that it lacks."""
        self._files = files
        self.chat_template = files.chat_template
        self.bos_token, self.eos_token = (files.config.get(key) for key in ("bos_token", "eos_token"))
        self.bos_id = self._id("bos_token")
        written = end_of_answer(self) if self.chat_template else None
        ends = (self._id("eos_token"), *files.eos_ids, self.special_tokens.get(written or ""))
        self.eos_ids = tuple(dict.fromkeys(id for id in ends if id is not None))
        pad_id = self._id("pad_token")
        self.pad_id = pad_id if pad_id is not None else (self.eos_ids or (0,))[0]

    def with_chat_template(self, choice: str | None) -> "Tokenizer":
        """The same vocabulary with the template that `choice` means (data/formats.py); None changes nothing.

        Raises ValueError for a name that is neither a format nor a file, and for a file that is no template.
        """
        if choice is None:
            return self
        return self._with(replace(self._files, chat_template=chat_template(choice, self)))

    def with_chat_of(self, folder: str | Path) -> "Tokenizer":
        """The same vocabulary with the template, BOS, EOS and stop ids saved in `folder`, an adapter's for example.

        What `folder` does not say stays. Raises ValueError for a damaged file, and for a token or an id that this
        vocabulary lacks.
        """
        chat = _chat_files(Path(folder))
        said = {key: token for key, token in chat.tokens.items() if token is not None}
        for id in chat.eos_ids:
            if self._backend.id_to_token(id) is None:
                raise ValueError(f"{folder}: eos_token_id in generation_config.json is {id}, no id of this vocabulary")
        return self._with(
            replace(
                self._files,
                where=str(folder),
                config=self._files.config | said,
                chat_template=chat.chat_template or self.chat_template,
                eos_ids=chat.eos_ids or self._files.eos_ids,
            )
        )

    def _with(self, files: TokenizerFiles) -> "Tokenizer":
        other = copy(self)
        other._take(files)
        return other

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Ids of the text alone. parse_special False: what looks like a special token is encoded as the text it is."""
        return self._encoding(text, parse_special).ids

    def encode_with_offsets(self, text: str, *, parse_special: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids, the (start, end) of each in the text, in characters); tokens of one character share its offsets."""
        encoding = self._encoding(text, parse_special)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ids. Bytes that are not whole characters become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
    ) -> list[int]:
        """Ids of a conversation, in the model's template or the plain one of data.chat.

        Raises ValueError when the template refuses the messages.
        """
        text = render(
            template_of(self),
            messages,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
            add_generation_prompt=add_generation_prompt,
        )
        return self.encode(text)

    def vocabulary(self) -> dict[str, int]:
        """The id of every token, special ones included."""
        return self._backend.get_vocab(with_added_tokens=True)

    def save(self, folder: str | Path) -> None:
        """Write the files that load_tokenizer and transformers' AutoTokenizer read, into an existing folder."""
        folder = Path(folder)
        contents = {
            "tokenizer.json": self._files.tokenizer,
            "tokenizer_config.json": self._files.config,
            "generation_config.json": {
                "bos_token_id": self.bos_id,
                "eos_token_id": list(self.eos_ids),
                "pad_token_id": self.pad_id,
            },
        }
        for name, content in contents.items():
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (folder / name).write_text(text + "\n", encoding="utf-8")
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8", newline="")

    def _encoding(self, text: str, parse_special: bool) -> tokenizers.Encoding:
        self._backend.encode_special_tokens = not parse_special
        return self._backend.encode(text, add_special_tokens=False)

    def _id(self, key: str) -> int | None:
        """The id of the token that the config names. Raises ValueError when the vocabulary lacks it."""
        token = self._files.config.get(key)
        if token is None:
            return None
        id = self._backend.token_to_id(token)
        if id is None:
            raise ValueError(f"{self._files.where}: {key} is {token!r}, which the vocabulary lacks")
        return id

    def _expects_bos(self) -> bool:
        """What the config says, else what the post-processor of tokenizer.json does."""
        said = self._files.config.get("add_bos_token")
        if isinstance(said, bool):
            return said
        return _backend(self._files, post_processor=True).encode("a").ids[:1] == [self.bos_id]


def _backend(files: TokenizerFiles, *, post_processor: bool) -> tokenizers.Tokenizer:
    """The library's object, without truncation and padding; without the post-processor, offsets are untrimmed."""
    content = files.tokenizer | {"truncation": None, "padding": None}
    if not post_processor:
        content["post_processor"] = None
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises a bare Exception
        reason = " ".join(str(error).split())
        raise ValueError(f"{files.where}: the tokenizers library cannot read this tokenizer: {reason}") from None


def _folder_files(folder: Path) -> TokenizerFiles:
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder}: has no tokenizer.json, the only tokenizer format that is read from a folder")
    chat = _chat_files(folder)
    return TokenizerFiles(
        where=str(folder),
        tokenizer=read_json(folder / "tokenizer.json"),
        config=chat.config | chat.tokens,
        chat_template=chat.chat_template,
        eos_ids=chat.eos_ids,
    )


@dataclass(frozen=True)
class _ChatFiles:
    """What a folder says beside the vocabulary."""

    config: dict[str, Any]
    """tokenizer_config.json without chat_template"""
    tokens: dict[str, str | None]
    """bos_token, eos_token and pad_token"""
    chat_template: str | None
    eos_ids: tuple[int, ...]


def _chat_files(folder: Path) -> _ChatFiles:
    config = _json_if_there(folder / "tokenizer_config.json")
    listed = _json_if_there(folder / "special_tokens_map.json")
    names = ("bos_token", "eos_token", "pad_token")
    tokens = {key: _token_text(config.get(key, listed.get(key)), key, folder) for key in names}
    template, jinja = config.pop("chat_template", None), folder / "chat_template.jinja"
    if jinja.is_file():
        try:
            template = jinja.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{jinja}: a chat template must be text in UTF-8") from None
    return _ChatFiles(config, tokens, _default_template(template, folder), _eos_ids(folder / "generation_config.json"))


def _json_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _token_text(value: Any, key: str, folder: Path) -> str | None:
    """A special token is stored as its text, or as an object with the text in it."""
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: {key} must be text, got {text!r}")
    return text


def _default_template(value: Any, folder: Path) -> str | None:
    """chat_template is a text, or a list of named ones of which `default` is taken."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template must be text, got {type(value).__name__}")
    return value


def _eos_ids(path: Path) -> tuple[int, ...]:
    value = _json_if_there(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(id) is int and id >= 0 for id in ids):
        raise ValueError(f"{path}: eos_token_id must be an id or a list of ids, got {value!r}")
    return tuple(ids)
