r"""The chat formats that --chat-template names, each a Jinja template, and which template a name or a file means.

    chatml    <|im_start|>user⏎2+2?<|im_end|>⏎<|im_start|>assistant⏎4<|im_end|>⏎
    llama-3   <|start_header_id|>user<|end_header_id|>⏎⏎2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>⏎⏎4…
    vicuna    A chat between … questions. USER: 2+2? ASSISTANT: 4</s>USER: …
    chatgpt   USER: 2+2?⏎ASSISTANT: 4</s>⏎USER: …
    alpaca    Below is an instruction … request.⏎⏎### Instruction:⏎2+2?⏎⏎### Response:⏎4</s>⏎⏎### Instruction:⏎…
    plain     2+2?⏎4</s>                    what a model without a template gets (chat.py)
    model     the model's own

A template here is whole only with the tokenizer it is for: lines in front of it set

    end              what ends an answer: the format's own token where the vocabulary has it, else EOS. It is learnt, so
                     that generation stops on an id; a text such as "USER:" stops nothing
    default_system   ChatML: the system message that the model's own ChatML writes when it is given none, so that here
                     and there are equal byte for byte. Others are written in the template

and BOS is written where the tokenizer expects it. {% generation %} marks the answers for other trainers; the mask here
does not read it (spans.py), and the tests compare the two.

Where the field has several: Llama 3's template, not 3.1's, which adds dates. Vicuna v1.1 with spaces. Alpaca writes a
newline after "### Response:", as its successors do; the first Alpaca had none. A system message takes its preamble's
place, and a row's input has its own section (a message may carry `instruction` and `input` beside `content`).
"""

import json
import re
from pathlib import Path

from .chat import PLAIN_TEMPLATE, Tokenizer, end_of_answer, render
from .sandbox import MAX_TEMPLATE, compile_template

CHATML = r"""
{%- for message in messages %}
    {%- if loop.first and default_system and message.role != 'system' %}
        {{- '<|im_start|>system\n' + default_system + '<|im_end|>\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- message.content ~ end }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content ~ end }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""

LLAMA_3 = r"""
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- message.content | trim ~ end }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content | trim ~ end }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

VICUNA = r"""
{%- set system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions." %}
{%- for message in messages %}
    {%- if loop.first and message.role == 'system' %}
        {{- message.content + ' ' if message.content }}
    {%- elif loop.first %}
        {{- system + ' ' }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- 'USER: ' + message.content + ' ' }}
    {%- elif message.role == 'assistant' %}
        {{- 'ASSISTANT:' }}
        {%- generation %}
            {{- ' ' + message.content ~ end }}
        {%- endgeneration %}
    {%- elif not loop.first or message.role != 'system' %}
        {{- raise_exception("this format has user, assistant and one system message in front, not " + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'ASSISTANT:' }}
{%- endif %}"""

CHATGPT = r"""
{%- for message in messages %}
    {%- if loop.first and message.role == 'system' %}
        {{- message.content + '\n' if message.content }}
    {%- elif message.role == 'user' %}
        {{- 'USER: ' + message.content + '\n' }}
    {%- elif message.role == 'assistant' %}
        {{- 'ASSISTANT:' }}
        {%- generation %}
            {{- ' ' + message.content ~ end }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- else %}
        {{- raise_exception("this format has user, assistant and one system message in front, not " + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'ASSISTANT:' }}
{%- endif %}"""

ALPACA = r"""
{%- for message in messages %}
    {%- if loop.first %}
        {%- if message.role == 'system' %}
            {{- message.content + '\n\n' if message.content }}
        {%- elif message.input %}
            {{- 'Below is an instruction that describes a task, paired with an input that provides further context. ' }}
            {{- 'Write a response that appropriately completes the request.\n\n' }}
        {%- else %}
            {{- 'Below is an instruction that describes a task. ' }}
            {{- 'Write a response that appropriately completes the request.\n\n' }}
        {%- endif %}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '### Instruction:\n' }}
        {%- if message.input %}
            {{- message.instruction + '\n\n### Input:\n' + message.input + '\n\n' }}
        {%- else %}
            {{- message.content + '\n\n' }}
        {%- endif %}
    {%- elif message.role == 'assistant' %}
        {{- '### Response:\n' }}
        {%- generation %}
            {{- message.content ~ end }}
        {%- endgeneration %}
        {{- '\n\n' if not loop.last }}
    {%- elif not loop.first or message.role != 'system' %}
        {{- raise_exception("this format has user, assistant and one system message in front, not " + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '### Response:\n' }}
{%- endif %}"""

FORMATS = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama-3": (LLAMA_3, "<|eot_id|>"),
    "vicuna": (VICUNA, None),
    "chatgpt": (CHATGPT, None),
    "alpaca": (ALPACA, None),
}
"""name → (template, the token that ends an answer; None: EOS)"""
NAMES = (*FORMATS, "plain", "model")
OWN_CHATML = re.compile(r"(?P<bos>.*?)(?:<\|im_start\|>system\n(?P<system>.*)<\|im_end\|>\n)?", re.DOTALL)


def chat_template(choice: str, tokenizer: Tokenizer) -> str | None:
    """The Jinja template that `choice`, one of NAMES or a file, means for this tokenizer; None: it has none of its own.

    Raises ValueError for a name that is neither, and, with the file's name, for a file that is no template.
    """
    if choice == "model":
        return tokenizer.chat_template
    bos, system = tokenizer.adds_bos, ""
    if choice == "chatml":
        bos, system = _as_the_models_own(tokenizer)
    start = "{{ bos_token }}" if bos else ""
    if choice == "plain":
        return start + PLAIN_TEMPLATE
    if choice not in FORMATS:
        return _read(Path(choice))
    template, end = FORMATS[choice]
    written = json.dumps(end) if end in tokenizer.special_tokens else "eos_token"
    settings = f"{{%- set end = {written} %}}\n"
    if choice == "chatml":
        settings += f"{{%- set default_system = {json.dumps(system, ensure_ascii=False)} %}}\n"
    return settings + start + template.removeprefix("\n")


def format_name(tokenizer: Tokenizer) -> str | None:
    """Which of NAMES the tokenizer's template is, if it is one of them."""
    if not tokenizer.chat_template:
        return "plain"
    for name in (*FORMATS, "plain"):
        if chat_template(name, tokenizer) == tokenizer.chat_template:
            return name
    return None


def describe(tokenizer: Tokenizer) -> str:
    """Which template it is and what ends an answer, in a sentence."""
    name = format_name(tokenizer)
    own_end = FORMATS[name][1] if name in FORMATS else None
    missing = f" (the format's {own_end} is no token of this vocabulary)" if _is_missing(own_end, tokenizer) else ""
    end = end_of_answer(tokenizer) or tokenizer.eos_token
    ends = f"an answer ends with {end}" if end else "nothing ends an answer"
    return f"chat template: {name or 'one of its own'}; {ends}{missing}"


def _is_missing(end: str | None, tokenizer: Tokenizer) -> bool:
    return end is not None and end not in tokenizer.special_tokens


def _as_the_models_own(tokenizer: Tokenizer) -> tuple[bool, str]:
    """(does a conversation begin with BOS, default system message), read off what the model's own ChatML writes."""
    question = "<|im_start|>user\nquestion<|im_end|>\n"
    try:
        text = render(
            tokenizer.chat_template or "",
            [{"role": "user", "content": "question"}],
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
        )
    except ValueError:
        text = ""
    found = OWN_CHATML.fullmatch(text.removesuffix(question)) if text.endswith(question) else None
    if found is None or found["bos"] not in ("", tokenizer.bos_token):
        return tokenizer.adds_bos, ""
    return bool(found["bos"]), found["system"] or ""


def _read(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"--chat-template {path}: there is no such file, and the names are {', '.join(NAMES)}")
    if path.stat().st_size > 4 * MAX_TEMPLATE:
        raise ValueError(f"{path}: a chat template has at most {MAX_TEMPLATE:,} characters; this file is larger")
    try:
        text = path.read_bytes().decode("utf-8")
        compile_template(text)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: a chat template must be text in UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return text
