"""Workplace: where submitted answers are computed. One at a time in the model's own cache, or several in a batch."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lowtide.memory.plan.batch import BatchPlan
from lowtide.models.chat_template import Message
from lowtide.models.errors import BadOption
from lowtide.runtime.batch.memory import BatchMemory, why_not_drafted
from lowtide.runtime.batch.open_batch import OpenBatch, open_batch
from lowtide.runtime.errors import hints_for
from lowtide.runtime.generation.active import ActiveGeneration
from lowtide.runtime.generation.chat import ChatPrompt, PromptEncoder
from lowtide.runtime.generation.loop import DecodeLoop, Outcome
from lowtide.runtime.generation.pace import PromptPace
from lowtide.runtime.generation.state import GenerationContext, GenerationRequest, GenerationState
from lowtide.runtime.generation.turns import RecentTurns
from lowtide.runtime.kv.session import KVSession
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.options import SamplingParams
from lowtide.runtime.profiling.profiler import Profiler

if TYPE_CHECKING:
    from lowtide.runtime.tools.use import ToolUse


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedPrompt:
    """What a caller submitted: a `text` to continue, or the `messages` of a chat where it is None.

    `tools` are those of `Runtime.chat`, and `arguments` are for the template.
    Raises `BadOption` where a text has what only a template reads.
    """

    text: str | None
    messages: Sequence[Message]
    params: SamplingParams
    asked_at: float
    tools: Sequence[Any] | ToolUse | None = None
    tool_choice: str = "auto"
    arguments: Mapping[str, Any] | None = None
    owner: str = ""

    def __post_init__(self) -> None:
        if self.text is not None and not (self.tools is None and self.arguments is None):
            raise BadOption(
                "tools and template_arguments are for messages, and the prompt is a text: pass "
                '[{"role": "user", "content": text}]'
            )


class Workplace(ABC):
    """A decode loop with what the scheduler needs around it. All methods but the properties run between passes."""

    num_sequences: int
    """How many answers run together."""
    encodes_beside: bool
    """Whether prompts are encoded while others are computed."""
    encoder: PromptEncoder

    @property
    @abstractmethod
    def loop(self) -> DecodeLoop:
        """The loop that computes the answers."""

    @property
    @abstractmethod
    def context(self) -> GenerationContext:
        """What their statistics say."""

    @property
    @abstractmethod
    def engine(self) -> Engine:
        """The loaded model."""

    @abstractmethod
    def max_tokens(self) -> int:
        """Return how many tokens a prompt may have now."""

    @abstractmethod
    def between_passes(self) -> AbstractContextManager[None]:
        """Wait until no pass runs; none starts in the block. Raises `RuntimeUnusable`."""

    @property
    def num_running(self) -> int:
        """How many answers are computed."""
        return self.loop.num_running

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to compute."""
        return self.loop.is_idle

    def encode(self, asked: AskedPrompt) -> tuple[GenerationRequest, ChatPrompt | None]:
        """Render and tokenise a prompt; return what is remembered of a chat with its answer, too."""
        messages, params, shown = self.encoder.with_tools(
            asked.messages, asked.params, asked.tools, asked.tool_choice
        )
        answer = self.engine.constrained_answer(params)
        most, prompt = self.max_tokens(), None
        with hints_for(self.engine.planned.spec.context_length):
            if asked.text is not None:
                request = self.encoder.encode_text(asked.text, most, params, asked.asked_at)
            else:
                request, prompt = self.encoder.encode_chat(
                    messages,
                    most,
                    params,
                    asked.asked_at,
                    tools=shown,
                    arguments=asked.arguments,
                    owner=asked.owner,
                )
        return replace(request, answer=answer, owner=asked.owner), prompt

    def add(self, key: int, request: GenerationRequest) -> None:
        """Let an answer join when there is room for it."""
        self.loop.add(GenerationState(key, request, self.engine.model, self.context))

    def remove(self, key: int) -> None:
        """Let an answer leave."""
        self.loop.remove(key)

    def step(self) -> Iterator[Outcome]:
        """Compute a pass."""
        return self.loop.step()

    def discard_ended(self) -> None:
        """Free what answers that have ended left in the cache."""
        return None

    def close(self) -> None:
        """Free what the workplace has of its own. Closing twice is allowed."""
        return None

    def remember(self, prompt: ChatPrompt, token_ids: Sequence[int]) -> None:
        """Remember the turn of a chat, which a later prompt may go on from."""
        self.encoder.remember(prompt, token_ids)


class OneAtATime(Workplace):
    """The model's own KV cache: an answer runs alone, as one of `Runtime.chat` or `Runtime.generate` does.

    It ends such an answer that is still read, and ends itself where one is started.
    """

    num_sequences = 1
    encodes_beside = False

    def __init__(
        self,
        engine: Engine,
        session: KVSession,
        encoder: PromptEncoder,
        active: ActiveGeneration,
        profiler: Profiler,
    ) -> None:
        self._engine = engine
        self.encoder = encoder
        self._active = active
        self._context = engine.generation_context()
        self._loop = DecodeLoop(session, self._context, profiler)
        self._number = 0

    @property
    def loop(self) -> DecodeLoop:
        """The loop over the one sequence."""
        return self._loop

    @property
    def context(self) -> GenerationContext:
        """What its statistics say."""
        return self._context

    @property
    def engine(self) -> Engine:
        """The loaded model."""
        return self._engine

    def max_tokens(self) -> int:
        """Return the context, or what the budget allows of it."""
        return self._engine.most_tokens()

    @contextlib.contextmanager
    def between_passes(self) -> Iterator[None]:
        """Wait for the pass that runs, of whichever answer."""
        with self._active.between_steps():
            if self._loop.is_idle:
                self._number = self._active.start()
            self._active.require_current(self._number)
            yield


class Together(Workplace):
    """A planned batch, which is open as long as the runtime. `encoder` encodes on a thread of its own.

    Raises `BadOption` where the model or its attention runs one sequence at a time, and `OverBudget`.
    """

    encodes_beside = True

    def __init__(
        self,
        engine: Engine,
        session: KVSession,
        plan: BatchPlan,
        encoder: PromptEncoder,
        active: ActiveGeneration,
        profiler: Profiler,
    ) -> None:
        self._engine = engine
        self.num_sequences = plan.num_sequences
        self.encoder = encoder
        self._active = active
        self._open = contextlib.ExitStack()
        memory = BatchMemory(engine, session)
        reason = why_not_drafted(engine.planned, engine.model, ())
        self._batch: OpenBatch = self._open.enter_context(
            open_batch(engine, memory, plan, profiler, reason, PromptPace())
        )

    @property
    def loop(self) -> DecodeLoop:
        """The loop over the batch."""
        return self._batch.loop

    @property
    def context(self) -> GenerationContext:
        """What the statistics say."""
        return self._batch.context

    @property
    def engine(self) -> Engine:
        """The loaded model."""
        return self._engine

    def max_tokens(self) -> int:
        """Return the most tokens of a sequence."""
        return self._batch.context.max_tokens

    def between_passes(self) -> AbstractContextManager[None]:
        """Wait for the pass that runs, of whichever answer."""
        return self._active.between_steps()

    def step(self) -> Iterator[Outcome]:
        """Compute a pass."""
        yield from self._batch.loop.step()
        self._batch.mark_if_slots_differ()

    def discard_ended(self) -> None:
        """Free what answers that have ended left in the cache."""
        self._batch.cache.discard_ended()

    def close(self) -> None:
        """Free the batch. Closing twice is allowed."""
        self._open.close()


def make_workplace(
    engine: Engine,
    session: KVSession,
    encoder: PromptEncoder,
    active: ActiveGeneration,
    profiler: Profiler,
) -> Workplace:
    """Return where submitted answers are computed; a batch of several has its memory in the plan."""
    plan = engine.planned.plan.batch
    if plan is None:
        return OneAtATime(engine, session, encoder, active, profiler)
    beside = encoder.beside(RecentTurns(plan.num_kv_tokens), engine.check_text)
    return Together(engine, session, plan, beside, active, profiler)
