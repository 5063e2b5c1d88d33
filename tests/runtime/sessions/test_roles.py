"""A chat is saved with the roles that its own template knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowtide import FakeModel, Runtime
from lowtide.models.errors import TemplateError

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'ipython' %}={{ m.content }}{% else %}"
    "{{ m.role }}:{{ m.content }};{% endif %}{% endfor %}"
)
CALL = {"function": {"name": "f", "arguments": {"x": [1, None]}}}
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "2 + 3?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "ipython", "content": "5"},
]


@pytest.mark.parametrize("state", [False, True])
def test_a_role_of_the_template_is_saved_and_loaded(tmp_path: Path, state: bool) -> None:
    path = tmp_path / "chat"
    with Runtime.open(FakeModel(), chat_template=TEMPLATE) as runtime:
        list(runtime.chat(CHAT))
        runtime.saved_chats.save(path, CHAT, state=state)
        loaded = runtime.saved_chats.load(path)
        assert list(loaded.messages) == CHAT
        assert list(runtime.chat(loaded.messages))
    with Runtime.open(FakeModel()) as other:
        messages = other.saved_chats.read_messages(path)
        with pytest.raises(TemplateError, match="the role 'ipython'"):
            other.chat(messages)
