"""data/chat.py and data/encode.py against transformers' tokenizer.apply_chat_template: the same text, the same ids.

The templates are written in the manner of the model families they are named after, with what those use: trim, slices,
namespace, macros, tojson, loop variables, break, whitespace control, {% generation %}, dates, raise_exception.
"""

import pytest
import transformers

from data import encode_messages, encode_prompt, render, template_of
from tests.toy_tokenizer import CHATML, ToyTokenizer

TEMPLATES = {
    "SmolLM2": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "Llama 2": "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = messages[0].content %}{% else %}"
    "{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system != false %}{% set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content %}"
    "{% else %}{% set text = m.content %}{% endif %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}",
    "Llama 3": "{{- bos_token }}{% for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '<|im_end|>\n' }}\n"
    "    {{- message['content'] | trim + '<|eot_id|>' }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant<|im_end|>\n' }}\n{%- endif %}\n",
    "Qwen 3": "{%- set ns = namespace(last=-1) %}\n{%- for m in messages[::-1] %}\n{%- if m.role == 'user' %}\n"
    "{%- set ns.last = messages | length - 1 - loop.index0 %}{% break %}\n{%- endif %}\n{%- endfor %}\n"
    "{%- for m in messages %}\n{%- set content = m.content %}\n{%- set reasoning = '' %}\n"
    "{%- if m.role == 'assistant' and '</think>' in content %}\n"
    "{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}\n"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}\n{%- endif %}\n"
    "{{- '<|im_start|>' + m.role + '\n' }}\n{%- if m.role == 'assistant' and loop.index0 > ns.last %}\n"
    "{{- '<think>\n' + reasoning + '\n</think>\n\n' }}\n{%- endif %}\n{{- content + '<|im_end|>\n' }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n{{- '<|im_start|>assistant\n' }}\n{%- endif %}",
    "Zephyr": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "Gemma": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% set role = 'model' %}{% else %}"
    "{% set role = m.role %}{% endif %}{{ '<|im_start|>' + role + '\n' + m.content | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}",
    "with macros and generation": "{% macro turn(m) -%}\n  {{ m.role | tojson | upper }}:\n{{ m.content | trim }}\n"
    "{%- endmacro %}\n{% for m in messages %}\n{% if m.role == 'assistant' %}\n{% generation %}\n"
    "{{ turn(m) }}{{ eos_token }}{% endgeneration %}\n{% else %}\n  {{ turn(m) }}\n{% endif %}\n{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '\"ASSISTANT\":\n' }}{% endif %}",
    "with a date": "Today is {{ strftime_now('%Y-%m-%d') }}.\n" + CHATML,
}

SYSTEM = {"role": "system", "content": "Trả lời ngắn gọn. <&>'\""}
CONVERSATIONS = {
    "one turn": [{"role": "user", "content": "Hello, how are you?"}, {"role": "assistant", "content": "I am fine."}],
    "white space": [{"role": "user", "content": "  Hello\n\n"}, {"role": "assistant", "content": "one\n\ntwo  \n"}],
    "unicode": [
        {"role": "user", "content": "Xin chào 🙂 e\u0301 \u2028"},
        {"role": "assistant", "content": "Chào 👩‍👩‍👧 ộ"},
    ],
    "many turns": [
        SYSTEM,
        *[{"role": role, "content": f"{role} {i}"} for i in range(3) for role in ("user", "assistant")],
    ],
    "thoughts": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "<think>\nOne and one.\n</think>\n\n2"},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\n4"},
    ],
}


def both(template: str) -> tuple[ToyTokenizer, transformers.PreTrainedTokenizerFast]:
    eos_token = "</s>" if "eos_token" in template else "<|eot_id|>" if "eot_id" in template else "<|im_end|>"
    ours = ToyTokenizer(template, bos_token="<s>", eos_token=eos_token)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=ToyTokenizer().backend, bos_token="<s>", eos_token=eos_token, chat_template=template
    )
    return ours, theirs


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_the_text_is_transformers(template: str, conversation: list[dict]) -> None:
    ours, theirs = both(template)
    for messages in (conversation, conversation[:-1]):
        for generation in (False, True):
            text = render(
                template_of(ours), messages, bos_token="<s>", eos_token=ours.eos_token, add_generation_prompt=generation
            )
            assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_the_ids_are_transformers(template: str, conversation: list[dict]) -> None:
    ours, theirs = both(template)
    ids = encode_messages(ours, conversation, max_seq_length=4096).ids
    assert ids == theirs.apply_chat_template(conversation, return_dict=False)
    prompt = encode_prompt(ours, conversation[:-1])
    assert prompt == theirs.apply_chat_template(conversation[:-1], add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_every_answer_and_its_end_is_learnt(template: str) -> None:
    """transformers has no mask to compare with for most templates: the learnt text is compared with the messages."""
    ours, _ = both(template)
    conversation = CONVERSATIONS["many turns"]
    example = encode_messages(ours, conversation, max_seq_length=4096)
    learnt = ours.decode([i for i, mask in zip(example.ids, example.completion_mask, strict=True) if mask])
    answers = [message["content"] for message in conversation if message["role"] == "assistant"]
    assert [part.strip(' "\n') for part in learnt.replace("<think>\n\n</think>", "").split(ours.eos_token)] == [
        *answers,
        "",
    ]


def test_a_token_across_the_answers_start_is_what_generation_sees() -> None:
    """GPT-2's pre-tokenizer reads "⏎⏎" as one token at the end of a text and as two before a letter. transformers
    trains on the second and generates from the first; here both are the first."""
    ours, theirs = both(
        CHATML.replace("assistant\n", "assistant\n\n").replace("+ '\n' + message", "+ '\n\n' + message")
    )
    conversation = CONVERSATIONS["one turn"]
    example = encode_messages(ours, conversation, max_seq_length=4096)
    prompt = theirs.apply_chat_template(conversation[:-1], add_generation_prompt=True, return_dict=False)
    assert example.ids != theirs.apply_chat_template(conversation, return_dict=False)
    assert example.ids == prompt + ours.encode("I am fine.<|im_end|>\n")


def test_a_refusal_is_transformers() -> None:
    ours, theirs = both(TEMPLATES["Llama 2"])
    messages = CONVERSATIONS["one turn"][::-1]
    with pytest.raises(Exception, match="Roles must alternate"):
        theirs.apply_chat_template(messages, tokenize=False)
    with pytest.raises(ValueError, match="Roles must alternate"):
        encode_prompt(ours, messages)
