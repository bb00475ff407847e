"""data/formats.py against transformers: the same ids and the same mask for each format, and folders that it loads.

transformers renders our template with its own jinja2, tokenizes it, and reads its mask off {% generation %}; ours comes
from spans.py, which does not read that tag. ChatML is compared with SmolLM2's own template besides, Llama-3 with the
template that Meta published with Llama-3-8B-Instruct.
"""

from pathlib import Path

import peft
import pytest
import tokenizers
import torch
import transformers
from tokenizers import pre_tokenizers

from data import FORMATS, encode_messages, encode_prompt, render
from data.chat import question
from lora import LoRAConfig, add_adapter, save_adapter, trainable_parameters
from models import Tokenizer, load_model, load_tokenizer, save_model
from models.gguf_tokenizer import LLAMA3
from tests.accuracy import error
from tests.small_base import write_base
from tests.toy_tokenizer import ToyTokenizer

SYSTEM = {"role": "system", "content": "Trả lời ngắn gọn. <&>'\""}
CONVERSATIONS = {
    "one turn": [{"role": "user", "content": "Hello, how are you?"}, {"role": "assistant", "content": "I am fine."}],
    "an input": [question("Say hello.", "in English\n"), {"role": "assistant", "content": "Hello!"}],
    "white space": [{"role": "user", "content": "  Hello\n\n"}, {"role": "assistant", "content": "one\n\ntwo  \n"}],
    "unicode": [
        SYSTEM,
        {"role": "user", "content": "Xin chào 🙂 e\u0301 \u2028"},
        {"role": "assistant", "content": "Chào 👩‍👩‍👧 ộ"},
    ],
    "an empty system message": [
        {"role": "system", "content": ""},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
    ],
    "many turns": [
        SYSTEM,
        *[{"role": role, "content": f"{role} {i}"} for i in range(3) for role in ("user", "assistant")],
    ],
}
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def backend(pieces: str) -> tokenizers.Tokenizer:
    """The toy BPE, cutting a text into pieces as GPT-2 or as Llama 3 does."""
    backend = ToyTokenizer().backend
    if pieces == "Llama 3's pieces":
        cut = pre_tokenizers.Split(tokenizers.Regex(LLAMA3[0]["pattern"]["Regex"]), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return backend


@pytest.fixture(scope="module", params=["GPT-2's pieces", "Llama 3's pieces"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that expects BOS and has every format's special tokens, written by transformers."""
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend(request.param),
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_end|>"],
        add_bos_token=True,
    )
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    folder = tmp_path_factory.mktemp("smollm2")
    tokenizer = load_tokenizer("smollm2-135m")
    tokenizer.save(folder)
    return tokenizer, folder


def assert_same(ours: Tokenizer, theirs: transformers.PreTrainedTokenizerFast, messages: list[dict]) -> None:
    """The ids and the mask, and the ids of the prompt.

    GPT-2's pieces make one token of the two newlines that end Llama 3's prompt, and two of them before an answer:
    transformers generates from the first and trains on the second, here both are the first. So with those pieces the
    text is compared in Llama 3's format, and the prompt's ids of one turn.
    """
    theirs.chat_template = ours.chat_template
    example = encode_messages(ours, messages, max_seq_length=4096)
    got = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    newlines_part = "<|start_header_id|>" in ours.chat_template and len(ours.encode("\n\na")) > 2
    n_answers = sum(message["role"] == "assistant" for message in messages)
    if newlines_part:
        assert ours.decode(example.ids) == theirs.decode(got["input_ids"])
        learnt = [i for i, mask in zip(example.ids, example.completion_mask, strict=True) if mask]
        assert learnt == [i for i, mask in zip(got["input_ids"], got["assistant_masks"], strict=True) if mask]
    else:
        assert example.ids == got["input_ids"]
        assert example.completion_mask == got["assistant_masks"]
    if n_answers == 1 or not newlines_part:
        prompt = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert encode_prompt(ours, messages[:-1]) == prompt == example.ids[: len(prompt)]


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("choice", FORMATS)
def test_ids_and_mask_are_transformers(folder: Path, choice: str, messages: list[dict]) -> None:
    ours = load_tokenizer(folder).with_chat_template(choice)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert_same(ours, theirs, messages)
    ids = encode_messages(ours, messages, max_seq_length=4096).ids
    assert ids.count(ours.bos_id) == 1
    assert ids[0] == ours.bos_id


@pytest.mark.parametrize("choice", FORMATS)
def test_ids_and_mask_are_transformers_with_smollm2s_vocabulary(smollm2: tuple[Tokenizer, Path], choice: str) -> None:
    tokenizer, folder = smollm2
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for messages in CONVERSATIONS.values():
        assert_same(tokenizer.with_chat_template(choice), theirs, messages)


def test_chatml_is_smollm2s_own_template_byte_for_byte(smollm2: tuple[Tokenizer, Path]) -> None:
    own, folder = smollm2
    ours = own.with_chat_template("chatml")
    assert ours.chat_template != own.chat_template
    assert ours.eos_ids == own.eos_ids
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for conversation in CONVERSATIONS.values():
        for messages in (conversation, conversation[:-1]):
            for waits in (False, True):
                text = render(ours.chat_template, messages, bos_token="", eos_token="", add_generation_prompt=waits)
                assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=waits)
                assert "named SmolLM" in text or messages[0]["role"] == "system"
        example = encode_messages(ours, conversation, max_seq_length=4096)
        assert example == encode_messages(own, conversation, max_seq_length=4096)
        assert example.ids == theirs.apply_chat_template(conversation, return_dict=False)


def test_llama_3_is_the_published_template(folder: Path) -> None:
    ours = load_tokenizer(folder).with_chat_template("llama-3")
    theirs = transformers.AutoTokenizer.from_pretrained(folder, chat_template=LLAMA_3)
    for conversation in CONVERSATIONS.values():
        for messages, waits in ((conversation, False), (conversation[:-1], True)):
            text = render(ours.chat_template, messages, bos_token="<s>", eos_token="", add_generation_prompt=waits)
            assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=waits)


@pytest.mark.parametrize("choice", [*FORMATS, "plain"])
def test_an_adapters_folder_is_loaded_with_its_chat_by_peft_and_transformers(tmp_path: Path, choice: str) -> None:
    base = write_base(tmp_path / "base")
    ours = load_tokenizer(base).with_chat_template(choice)
    model = add_adapter(load_model(base), LoRAConfig(r=2))
    for _, parameter in trainable_parameters(model):
        torch.nn.init.normal_(parameter)
    save_adapter(model.eval(), tmp_path / "adapter", base_model_name=str(base), beside=ours.save)

    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert theirs.chat_template == ours.chat_template
    assert theirs.eos_token == ours.eos_token
    messages = CONVERSATIONS["one turn"]
    prompt = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_tensors="pt")["input_ids"]
    if choice != "plain":  # it has no generation prompt of its own, and needs none
        assert prompt[0].tolist() == encode_prompt(ours, messages[:-1])
    with torch.no_grad():
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        plain, found = loaded(prompt).logits, model(prompt)
        exact = loaded.double()(prompt).logits
        assert error(found, exact) <= 4 * error(plain, exact)  # a wrong adapter is off by a million times as much
    stops = transformers.GenerationConfig.from_pretrained(tmp_path / "adapter")
    assert stops.eos_token_id == list(ours.eos_ids)


def test_a_models_folder_is_loaded_with_its_chat_by_transformers(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    ours = load_tokenizer(base).with_chat_template("vicuna")
    save_model(load_model(base), tmp_path / "model", tokenizer=ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    again = load_tokenizer(tmp_path / "model")
    assert theirs.chat_template == again.chat_template == ours.chat_template
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.generation_config.eos_token_id == list(again.eos_ids) == list(ours.eos_ids)


def test_the_chat_that_transformers_saves_beside_an_adapter_is_taken(folder: Path, tmp_path: Path) -> None:
    """Without generation_config.json, as PEFT and TRL leave it: the template shows what ends an answer."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder, chat_template=LLAMA_3)
    theirs.save_pretrained(tmp_path)
    base = load_tokenizer(folder)
    ours = base.with_chat_of(tmp_path)
    assert ours.chat_template == LLAMA_3
    assert ours.eos_ids == (base.eos_ids[0], ours.special_tokens["<|eot_id|>"])
    assert encode_prompt(ours, [SYSTEM]) == theirs.apply_chat_template(
        [SYSTEM], add_generation_prompt=True, return_dict=False
    )
