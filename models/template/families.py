"""Chat templates for model files without one: the published prompt formats of known families.

A family is recognised by its markers, where the vocabulary has each as one token. Formats whose markers are plain
text are recognised by the model's name. The beginning-of-text token is left to the tokenizer.
"""

# ruff: noqa: RUF001

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from lowtide.models.spec import ModelSpec
from lowtide.models.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Family:
    """A prompt format: what its template prints, the `markers` that must be tokens, and a pattern of names for some."""

    name: str
    prompt: str
    markers: tuple[str, ...] = ()
    model_names: str = ""

    @property
    def template(self) -> str:
        """The template's source: jinja2 removes one line end at the end of a template."""
        return self.prompt + "\n" if self.prompt.endswith("\n") else self.prompt

    def matches(self, model_name: str, has_token: Callable[[str], bool]) -> bool:
        """Whether a model with this name and vocabulary belongs to the family."""
        if not self.markers and not self.model_names:
            return False
        named = re.search(self.model_names, model_name, re.IGNORECASE) is not None
        return named and all(map(has_token, self.markers))


def family_of(model_name: str, has_token: Callable[[str], bool]) -> Family | None:
    """Return the family of a model, None where it is not known.

    `has_token` says whether a text is one token of the vocabulary.
    """
    return next((family for family in FAMILIES if family.matches(model_name, has_token)), None)


def template_of(spec: ModelSpec, tokenizer: Tokenizer) -> tuple[str | None, str | None]:
    """Return the template to use with a model, and the name of its family where the file has no template.

    Both are None where there is no template and the family is not known.
    """
    if spec.chat_template is not None:
        return spec.chat_template, None

    def has_token(text: str) -> bool:
        return len(tokenizer.encode(text, add_special=False, parse_special=True)) == 1

    family = family_of(spec.name, has_token)
    return (None, None) if family is None else (family.template, family.name)


def _turns(turn: str, start: str, *, assistant: str = "assistant") -> str:
    """Return a template with the same form for each role; `ROLE` is the role's name in it."""
    role = f"{{{{ '{assistant}' if m.role == 'assistant' else m.role }}}}"
    return "{% for m in messages %}" + turn.replace("ROLE", role) + "{% endfor %}" + start


_TEXT = "{{ m.content | trim }}"
_WITH_SYSTEM_IN_FIRST_TURN = (
    "{% set system = messages[0].content | trim if messages and messages[0].role == 'system' else '' %}"
    "{% for m in (messages[1:] if system else messages) %}"
    "{% set text = system ~ '\n\n' ~ (m.content | trim) if system and loop.first and m.role == 'user' "
    "else m.content | trim %}"
)
_PHI4 = _turns(
    "<|im_start|>ROLE<|im_sep|>{{ m.content }}<|im_end|>", "<|im_start|>assistant<|im_sep|>"
)
_CHATML = _turns("<|im_start|>ROLE\n{{ m.content }}<|im_end|>\n", "<|im_start|>assistant\n")
_DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% elif m.role == 'assistant' %}"
    "<｜Assistant｜>{{ m.content }}<｜end▁of▁sentence｜>{% else %}{{ m.content }}{% endif %}{% endfor %}<｜Assistant｜>"
)
_GRANITE = _turns(
    "<|start_of_role|>ROLE<|end_of_role|>{{ m.content }}<|end_of_text|>\n",
    "<|start_of_role|>assistant<|end_of_role|>",
)
_COMMAND_R = (
    "{% for m in messages %}<|START_OF_TURN_TOKEN|>{% if m.role == 'user' %}<|USER_TOKEN|>"
    "{% elif m.role == 'assistant' %}<|CHATBOT_TOKEN|>{% else %}<|SYSTEM_TOKEN|>{% endif %}"
    f"{_TEXT}<|END_OF_TURN_TOKEN|>{{% endfor %}}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
)
_LLAMA4 = _turns(
    f"<|header_start|>ROLE<|header_end|>\n\n{_TEXT}<|eot|>",
    "<|header_start|>assistant<|header_end|>\n\n",
)
_LLAMA3 = _turns(
    f"<|start_header_id|>ROLE<|end_header_id|>\n\n{_TEXT}<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
)
_GLM4 = "[gMASK]<sop>" + _turns("<|ROLE|>\n{{ m.content }}", "<|assistant|>\n")
_GEMMA = (
    _WITH_SYSTEM_IN_FIRST_TURN
    + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ text }}<end_of_turn>\n{% endfor %}"
    "<start_of_turn>model\n"
)
_PHI3 = _turns("<|ROLE|>\n{{ m.content }}<|end|>\n", "<|assistant|>\n")
_MISTRAL = (
    _WITH_SYSTEM_IN_FIRST_TURN
    + "{% if m.role == 'assistant' %} {{ text }}{{ eos_token }}{% else %}[INST] {{ text }} [/INST]{% endif %}"
    "{% endfor %}"
)
_LLAMA2 = (
    "{% set system = messages[0].content | trim if messages and messages[0].role == 'system' else '' %}"
    "{% for m in (messages[1:] if system else messages) %}{% if m.role == 'assistant' %} {{ m.content | trim }} "
    "{{ eos_token }}{% else %}{{ bos_token if not loop.first }}[INST] {% if system and loop.first %}"
    f"<<SYS>>\n{{{{ system }}}}\n<</SYS>>\n\n{{% endif %}}{_TEXT} [/INST]{{% endif %}}{{% endfor %}}"
)
_ZEPHYR = _turns("<|ROLE|>\n{{ m.content }}{{ eos_token }}\n", "<|assistant|>\n")

FAMILIES = (
    # ChatML stands before the formats of base models: fine-tunes add its markers to their vocabularies.
    Family("Phi-4", _PHI4, ("<|im_start|>", "<|im_sep|>", "<|im_end|>")),
    Family("ChatML", _CHATML, ("<|im_start|>", "<|im_end|>")),
    Family("DeepSeek", _DEEPSEEK, ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")),
    Family("Granite", _GRANITE, ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>")),
    Family(
        "Command-R",
        _COMMAND_R,
        ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    ),
    Family("Llama 4", _LLAMA4, ("<|header_start|>", "<|header_end|>", "<|eot|>")),
    Family("Llama 3", _LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    Family("GLM-4", _GLM4, ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>")),
    Family("Gemma", _GEMMA, ("<start_of_turn>", "<end_of_turn>")),
    Family("Phi-3", _PHI3, ("<|user|>", "<|assistant|>", "<|end|>")),
    Family("Mistral", _MISTRAL, ("[INST]", "[/INST]")),
    Family("Llama 2", _LLAMA2, (), r"llama.?2.*chat"),
    Family("Mistral", _MISTRAL, (), r"mi[sx]tral.*instruct"),
    Family("Zephyr", _ZEPHYR, (), r"zephyr"),
)
"""The known families, the more specific first."""

LONGEST_TEMPLATE = max((family.template for family in FAMILIES), key=len)
"""What the memory of a template is planned with before the vocabulary of a model without one is loaded."""
