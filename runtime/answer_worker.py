"""One side of a benchmark of answers, in a process of its own; started as `bench_worker` is.

Knows no other side.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lowtide.memory.meter import read_process_memory
from lowtide.models.chat_template import ChatTemplate
from lowtide.models.errors import BadOption
from lowtide.models.header import read_spec
from lowtide.runtime.conversation import Conversation, LastAnswer
from lowtide.runtime.generate import Prompt, generate
from lowtide.runtime.loaded_model import LoadedModel
from lowtide.runtime.options import GenerationOptions
from lowtide.runtime.planning import OpenOptions, plan_spec
from lowtide.runtime.speculator_loading import load_speculator


class AnswerWorker:
    """A loaded model that answers prompts greedily; each as if it were the first."""

    def __init__(self, path: str, options: dict[str, Any]) -> None:
        self._planned = plan_spec(read_spec(Path(path)), OpenOptions(**options))
        self._loaded = LoadedModel(self._planned)
        self._session = self._loaded.new_session()

    def answer(self, prompt: str, tokens: int) -> dict[str, Any]:
        """Answer with up to `tokens` tokens: the seconds of decoding, the tokens, and what was drafted."""
        loaded, token_ids = self._loaded, self._prompt_ids(prompt)
        if len(token_ids) + tokens > loaded.most_tokens():
            raise BadOption(
                f"a prompt has {len(token_ids)} tokens, and {tokens} more do not fit the context of "
                f"{loaded.most_tokens()}: raise --context"
            )
        self._session.forget()
        self._forget_drafts()
        pieces = list(
            generate(
                loaded.model,
                self._session,
                Prompt(token_ids=token_ids, asked_at=time.perf_counter()),
                GenerationOptions(max_tokens=tokens, temperature=0),
                loaded.run_facts(),
            )
        )
        stats = pieces[-1].stats
        return {
            "seconds": stats.decode_s,
            "token_ids": [piece.token_id for piece in pieces],
            "decoded": max(stats.generated_tokens - 1, 0),
            "speculation": stats.speculation,
        }

    def _prompt_ids(self, prompt: str) -> list[int]:
        spec, tokenizer = self._planned.spec, self._loaded.model.tokenizer
        if spec.chat_template is None:
            return tokenizer.encode(prompt, add_special=True, parse_special=False)
        template = ChatTemplate(spec.chat_template, tokenizer.special_texts)
        conversation = Conversation(template, tokenizer, LastAnswer())
        messages = [{"role": "user", "content": prompt}]
        return conversation.prompt_ids(conversation.render(messages), messages)

    def _forget_drafts(self) -> None:
        """Drafts that learn begin anew; a draft model goes back by itself."""
        wish = self._planned.speculation
        if wish is not None and wish.draft_model is None:
            loaded = self._loaded
            loaded.speculator = load_speculator(self._planned, loaded.model, loaded.steering)

    def facts(self) -> dict[str, Any]:
        """Return what this process took."""
        return {
            "attention": str(self._planned.policy),
            "peak_rss_bytes": read_process_memory().peak_bytes,
        }
