"""Model files without a chat template get that of their family, where the vocabulary has its markers."""

from __future__ import annotations

import pytest

from lowtide.models.chat_template import ChatTemplate
from lowtide.models.template.families import FAMILIES, family_of
from lowtide.models.text.prompt_span import text_of

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Why?"},
]
PROMPTS = {
    "Phi-4": "<|im_start|>system<|im_sep|>Be kind.<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|>"
    "<|im_start|>assistant<|im_sep|>Hello<|im_end|><|im_start|>user<|im_sep|>Why?<|im_end|>"
    "<|im_start|>assistant<|im_sep|>",
    "ChatML": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    "DeepSeek": "Be kind.<｜User｜>Hi<｜Assistant｜>Hello<｜end▁of▁sentence｜><｜User｜>Why?<｜Assistant｜>",
    "Granite": "<|start_of_role|>system<|end_of_role|>Be kind.<|end_of_text|>\n"
    "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>Hello<|end_of_text|>\n"
    "<|start_of_role|>user<|end_of_role|>Why?<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
    "Command-R": "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be kind.<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Hello<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Why?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "Llama 4": "<|header_start|>system<|header_end|>\n\nBe kind.<|eot|>"
    "<|header_start|>user<|header_end|>\n\nHi<|eot|><|header_start|>assistant<|header_end|>\n\nHello<|eot|>"
    "<|header_start|>user<|header_end|>\n\nWhy?<|eot|><|header_start|>assistant<|header_end|>\n\n",
    "Llama 3": "<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "GLM-4": "[gMASK]<sop><|system|>\nBe kind.<|user|>\nHi<|assistant|>\nHello<|user|>\nWhy?<|assistant|>\n",
    "Gemma": "<start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
    "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
    "Phi-3": "<|system|>\nBe kind.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n"
    "<|user|>\nWhy?<|end|>\n<|assistant|>\n",
    "Mistral": "[INST] Be kind.\n\nHi [/INST] Hello</s>[INST] Why? [/INST]",
    "Llama 2": "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] Why? [/INST]",
    "Zephyr": "<|system|>\nBe kind.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n"
    "<|user|>\nWhy?</s>\n<|assistant|>\n",
}


@pytest.mark.parametrize(
    "family", FAMILIES, ids=lambda family: f"{family.name} {family.model_names}"
)
def test_each_family_renders_its_published_format(family) -> None:  # type: ignore[no-untyped-def]
    assert text_of(ChatTemplate(family.template, SPECIAL).render(CHAT)) == PROMPTS[family.name]
    alone = text_of(ChatTemplate(family.template, SPECIAL).render(CHAT[1:2]))
    assert "Hi" in alone
    assert "kind" not in alone


@pytest.mark.parametrize(
    "family", FAMILIES, ids=lambda family: f"{family.name} {family.model_names}"
)
def test_a_family_is_found_by_its_markers_or_its_name(family) -> None:  # type: ignore[no-untyped-def]
    names = {
        "Llama 2": "Llama 2 7B Chat",
        "Mistral": "Mixtral-8x7B-Instruct-v0.1",
        "Zephyr": "zephyr-7b-beta",
    }
    found = family_of(names.get(family.name, ""), family.markers.__contains__)
    assert found is not None
    assert found.name == family.name


@pytest.mark.parametrize("missing", FAMILIES[0].markers)
def test_every_marker_must_be_a_token(missing: str) -> None:
    markers = {"<|im_start|>", "<|im_end|>"} - {missing}
    family = family_of("Llama 2 7B", markers.__contains__)
    assert (family is None) == (missing != "<|im_sep|>")


def test_a_fine_tune_with_markers_of_its_own_gets_their_format() -> None:
    markers = {"<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>"}
    family = family_of("gemma-chatml", markers.__contains__)
    assert family is not None
    assert family.name == "ChatML"
