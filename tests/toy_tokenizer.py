"""A small byte-level BPE with ChatML's special tokens, trained on the spot: data/'s tests depend on no model."""

from collections.abc import Sequence
from functools import lru_cache

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|eot_id|>")

CORPUS = [
    "user\nHello, how are you? assistant\nI am fine, thank you.\n\n system\nYou are a helpful assistant.",
    "The quick brown fox jumps over the lazy dog. 0123456789 [INST] [/INST] USER: ASSISTANT:",
    "Xin chào thế giới, tôi là một mô hình ngôn ngữ. Nguyễn Thị Lan, café, naïve, Zürich",
]


class ToyTokenizer:
    """Has data.chat.Tokenizer's attributes; the defaults are those of a ChatML model."""

    def __init__(
        self,
        chat_template: str | None = CHATML,
        *,
        bos_token: str | None = None,
        eos_token: str | None = "<|im_end|>",
        adds_bos: bool = False,
    ) -> None:
        self.backend = tokenizers.Tokenizer.from_str(_trained())
        self.chat_template = chat_template
        self.bos_token, self.eos_token, self.adds_bos = bos_token, eos_token, adds_bos
        self.special_tokens = {token: self.backend.token_to_id(token) for token in SPECIAL}
        self.bos_id = self.special_tokens[bos_token] if bos_token else None
        self.eos_ids = (self.special_tokens[eos_token],) if eos_token else ()

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        return self.encode_with_offsets(text, parse_special=parse_special)[0]

    def encode_with_offsets(self, text: str, *, parse_special: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        self.backend.encode_special_tokens = not parse_special
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)


@lru_cache
def _trained() -> str:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        min_frequency=1,
        show_progress=False,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()
