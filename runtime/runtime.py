"""Runtime: opens a model inside a memory budget, generates text with it, and closes it."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lowtide.memory.budget import Ledger
from lowtide.memory.os.descriptors import hold_standard_descriptors
from lowtide.memory.plan.plan import MemoryPlan
from lowtide.memory.process import not_charged_if_refused
from lowtide.memory.reclaim import Reclaimer
from lowtide.models.arguments.values import shown
from lowtide.models.chat_template import Message
from lowtide.models.errors import BadOption
from lowtide.models.model import Model
from lowtide.models.spec import ModelSpec
from lowtide.models.template.families import template_of
from lowtide.runtime.arguments import checked_messages, checked_prompt, checked_prompts
from lowtide.runtime.backends.backend import Progress
from lowtide.runtime.batch.generator import BatchGenerator, ParamsOfAll, params_of_each
from lowtide.runtime.batch.queue import QueueFigures
from lowtide.runtime.batch.scheduler import Scheduler
from lowtide.runtime.batch.submission import Submission, read, read_all
from lowtide.runtime.batch.workplace import AskedPrompt, Workplace, make_workplace
from lowtide.runtime.embedding.beside import embedded
from lowtide.runtime.embedding.options import EmbeddingConfig, require_pooled
from lowtide.runtime.embedding.passes import checked_texts
from lowtide.runtime.errors import RuntimeUnusable, hints_for
from lowtide.runtime.generation.active import ActiveGeneration, collect_dropped
from lowtide.runtime.generation.chat import ChatPrompt, PromptEncoder
from lowtide.runtime.generation.closable import ClosableGenerator
from lowtide.runtime.generation.loop import DecodeLoop
from lowtide.runtime.generation.result import GenerationChunk, GenerationResult
from lowtide.runtime.generation.state import GenerationRequest, GenerationState
from lowtide.runtime.generation.turns import LastTurn
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.options import SamplingParams
from lowtide.runtime.planning.plan import LoadConfig, ResolvedModel, plan_model, plan_reference
from lowtide.runtime.profiling.profiler import SILENT, Profiler
from lowtide.runtime.profiling.retention_map import RetainedSpan
from lowtide.runtime.sessions.store import SavedChats

if TYPE_CHECKING:
    from lowtide.runtime.embedding.passes import Vectors
    from lowtide.runtime.tools.grammar import CallSyntax
    from lowtide.runtime.tools.use import ToolUse


class Runtime:
    """A loaded model that generates inside its memory plan. Made by `Runtime.open`; a context manager.

    It runs one answer or one batch at a time: another one ends it. Answers that are submitted (`submit`) end nobody:
    they run together where the runtime was opened with `sequences`, and wait for one another otherwise. Every method
    may be called from any thread, and waits for the forward pass that runs. A runtime that is dropped without `close`
    is freed when it is collected, with a `ResourceWarning`. A forked child cannot use the runtime of its parent: it
    opens one of its own.
    """

    def __init__(self, engine: Engine, profiler: Profiler = SILENT) -> None:
        self._engine = engine
        self._profiler = profiler
        self._model = engine.model
        self._session = engine.new_session()
        engine.reclaimers.insert(0, Reclaimer("complete", self._session.clear))
        last = LastTurn()
        template, self._template_family = template_of(self.spec, self._model.tokenizer)
        self._encoder = PromptEncoder(
            self._model.tokenizer, template, last, self._check_text, profiler
        )
        self._batch = BatchGenerator(engine, self._session, profiler)
        self._active = ActiveGeneration(free=self._free)
        try:
            self._workplace: Workplace = make_workplace(
                engine, self._session, self._encoder, self._active, profiler
            )
        except BaseException:
            del self._active  # there is nothing to close
            engine.close()
            raise
        self._scheduler = Scheduler(self._workplace, self.planned.options.max_waiting)
        self._saved_chats = SavedChats(
            engine,
            self._session,
            last,
            template=template or "",
            start=self._start,
            alone=self._active.between_steps,
        )

    @classmethod
    def open(
        cls,
        model: str | os.PathLike[str] | Model | None = None,
        *,
        profiler: Profiler | None = None,
        **options: Any,
    ) -> Runtime:
        """Plan and load a model so that the whole process stays inside the budget.

        `model` is a path, a name ("smollm2"), "hf:user/repo:Q4_K_M", a `Model` of your own, or None for the default
        model. `profiler` records where time and memory go. The `options` are the fields of `LoadConfig`, by name:

        * `memory`: the budget, a size ("1GiB") or a share ("50%") of the available memory; default 80%
        * `context`: tokens of context; default the longest that fits
        * `kv_type`: "f16", "q8_0" or "q4_0"; default the best that fits
        * `batch_size`: tokens of a forward pass
        * `expected_tokens`: tokens of the longest prompt with its answer, if known; the plan makes room for them first
        * `threads`: a number, or "auto" (the default): the cores that this process may use, fewer while others do
        * `background`: True computes with the lowest priority, and leaves a core to others
        * `attention`: "auto" (the default: "dense" where it works and is not slower), "llama" (the engine's kernels),
          "dense" (lowtide's, exact), or an approximation: "tidal", "delta", "gem", or a policy object such as
          `Tidal(k=512)`
        * `prefix_cache`: size of the cache for the prefixes of earlier prompts; default 0
        * `repack`: True multiplies repacked weights with lowtide's matmul kernels, False with the engine's; "auto", the
          default, is True where lowtide's know the weights, are not slower and fit into the budget
        * `reference`: True runs the engine's own kernels alone, token for token
        * `gpu_layers`, `gpu_memory`: layers on GPUs, a number or "auto", and the size to use of each GPU
        * `speculate`: "off" (the default), "ngram", "trigram", "auto" or a draft model, with ":draft=N" for the most
          draft tokens of a pass
        * `quality`: "exact" (the default), or "high" or "fast": the fastest calibrated policy whose measured distance
          from exact answers is inside a limit; `planned.quality` says which
        * `provider`: the execution provider of an ONNX model ("cpu", "cuda")
        * `structured`: True reserves the memory of structured output (`SamplingParams.constraint`) in the plan
        * `rules_bytes`: bytes of `Avoid`, `Paths` and their like (`num_bytes`), to be reserved in the plan
        * `sequences`, `max_waiting`: answers that run together (default 1), and that may wait behind those (64)
        * `offline`: True downloads nothing
        * `chat_template`: a chat template instead of the model's own: its text, or the `Path` of a file

        Raises `OverBudget`, before anything is loaded, if the model cannot fit, `ModelError` for an unusable
        model, `NoGpu` if there is no GPU, and `BadOption` for a wrong option or value.
        """
        hold_standard_descriptors()
        if profiler is not None and not isinstance(profiler, Profiler):
            raise BadOption(f"profiler is {shown(profiler)}; it must be a Profiler, or None")
        collect_dropped()
        config = replace(LoadConfig.of(**options), profiled=profiler is not None)
        with not_charged_if_refused():
            with (profiler or SILENT).span("plan"):
                planned = (
                    plan_model(model, config)
                    if isinstance(model, Model)
                    else plan_reference(model, config)
                )
            return cls.load(planned, profiler)

    @classmethod
    def load(
        cls,
        planned: ResolvedModel,
        profiler: Profiler | None = None,
        progress: Progress = lambda _: None,
    ) -> Runtime:
        """Reserve the plan's lines and load the model.

        `progress` is called with the bytes of a repacked copy as they are written, where one is made.
        """
        profiler = profiler or SILENT
        return cls(Engine(planned, profiler, progress), profiler)

    @property
    def ledger(self) -> Ledger:
        """The bytes that each component has reserved."""
        return self._engine.ledger

    @property
    def plan(self) -> MemoryPlan:
        """The memory plan; prints as a table."""
        return self.planned.plan

    @property
    def spec(self) -> ModelSpec:
        """The model's shape and size."""
        return self.planned.spec

    @property
    def template_family(self) -> str | None:
        """The family whose chat template is used because the file has none, such as "Gemma"; else None."""
        return self._template_family

    @property
    def call_syntax(self) -> CallSyntax:
        """How the model writes calls of tools, found by rendering its chat template."""
        with self._active.between_steps():
            return self._encoder.call_syntax

    @property
    def planned(self) -> ResolvedModel:
        """The plan with the model and the machine that it was made for."""
        return self._engine.planned

    @property
    def saved_chats(self) -> SavedChats:
        """Chats on disk with their KV cache: `save(path, messages)` and `load(path)`."""
        return self._saved_chats

    def retained_spans(self) -> list[RetainedSpan]:
        """Return the spans that `gem` retained of the last prompt that it filtered, in order."""
        return self._engine.retained_spans()

    def chat(
        self,
        messages: Sequence[Message] | str,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Any] | ToolUse | None = None,
        tool_choice: str = "auto",
        template_arguments: Mapping[str, Any] | None = None,
        **named: Any,
    ) -> Generator[GenerationChunk, None, None]:
        """Answer a chat, chunk by chunk; `named` are fields of `SamplingParams`, `response_format` among them.

        `messages` are dicts with "role" and "content": a text, or a list of text parts. A text alone is one question
        of the user. `tools` are functions, or JSON schemas of them, that the model may call, by `tool_choice` ("auto",
        "none", "required" or a name); `lowtide.run_tools` runs them. `template_arguments` are for the template.
        What a message, a tool or an argument says is text: it never becomes a control token.
        Raises `TemplateError` where the template refuses messages, and `PromptTooLong`, before anything is computed.
        Closing the iterator stops the answer.
        """
        asked_at = time.perf_counter()
        params = SamplingParams.of(params, **named)
        messages = checked_messages(messages)
        self._check_chat(params)
        if self._submits:
            named = {"tools": tools, "tool_choice": tool_choice}
            named["template_arguments"] = template_arguments
            return ClosableGenerator(read(self.submit(messages, params, **named)))
        with self._active.between_steps():
            messages, params, shown = self._encoder.with_tools(messages, params, tools, tool_choice)
        answer = self._engine.constrained_answer(params)
        with self._active.between_steps(), hints_for(self.spec.context_length):
            number = self._start()
            request, prompt = self._encoder.encode_chat(
                messages,
                self._engine.most_tokens(),
                params,
                asked_at,
                tools=shown,
                arguments=template_arguments,
            )
        return ClosableGenerator(self._remembered(number, replace(request, answer=answer), prompt))

    def stream(
        self, prompt: str, params: SamplingParams | None = None, **named: Any
    ) -> Generator[GenerationChunk, None, None]:
        """Continue `prompt` as it stands, without a chat template, chunk by chunk; see `chat`."""
        asked_at = time.perf_counter()
        params = SamplingParams.of(params, **named)
        prompt = checked_prompt(prompt)
        self._engine.check(params, is_completion=True)
        if self._submits:
            return ClosableGenerator(read(self.submit(prompt, params)))
        answer = self._engine.constrained_answer(params)
        with self._active.between_steps(), hints_for(self.spec.context_length):
            number = self._start()
            request = self._encoder.encode_text(
                prompt, self._engine.most_tokens(), params, asked_at
            )
        steps = self._generate(replace(request, answer=answer))
        return ClosableGenerator(self._active.run(number, steps))

    def generate(
        self, prompt: str, params: SamplingParams | None = None, **named: Any
    ) -> GenerationResult:
        """Continue `prompt` as `stream` does and return the whole result, with `parsed` for a `response_format`."""
        params = SamplingParams.of(params, **named)
        return GenerationResult.of(self.stream(prompt, params), params.constraint)

    def submit(
        self,
        prompt: str | Sequence[Message] | Message,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Any] | ToolUse | None = None,
        tool_choice: str = "auto",
        template_arguments: Mapping[str, Any] | None = None,
        owner: str = "",
        **named: Any,
    ) -> Submission:
        """Return an answer that the runtime's own thread computes, at once and from any thread or asyncio loop.

        Texts are continued as by `generate`, messages answered as by `chat`, also with `tools`. Up to `sequences` of
        them run together, the others wait in the order in which they came. A prompt is read in parts beside the other
        answers, whose next tokens it delays by at most `pace.MAX_PAUSE_S` seconds. What several prompts of one `owner`
        begin with is read and stored once; those of others are found neither in it nor by its times. A greedy answer is
        that of its prompt alone, token for token, where `stats.batch` is None or `stats.batch["identical"]` is True.

        Raises `BadOption` for a wrong argument, `QueueFull` where `max_waiting` answers wait, and `RuntimeUnusable`
        after `close`. What is found out later (a prompt too long, a wrong tool) is raised where it is read.
        """
        asked_at = time.perf_counter()
        params = SamplingParams.of(params, **named)
        if not isinstance(prompt, str):
            messages = tuple(checked_messages(prompt))
            self._check_chat(params)
        else:
            messages = ()
            self._engine.check(params, is_completion=True)
        self._active.require_open()
        asked = AskedPrompt(
            text=prompt if isinstance(prompt, str) else None,
            messages=messages,
            params=params,
            asked_at=asked_at,
            tools=tools,
            tool_choice=tool_choice,
            arguments=template_arguments,
            owner=owner,
        )
        return self._scheduler.submit(asked)

    @property
    def queue(self) -> QueueFigures:
        """How many submitted answers run and wait, and how fast."""
        return self._scheduler.figures

    @property
    def _submits(self) -> bool:
        """Whether an answer must be submitted, because others run together or were submitted before."""
        return self._workplace.num_sequences > 1 or self._scheduler.is_busy

    def _check_chat(self, params: SamplingParams) -> None:
        self._engine.check(params)
        if params.special:
            raise BadOption(
                "special is for raw prompts, and a chat's control tokens are those of its template: leave it out, or "
                "use Runtime.generate"
            )

    def stream_batch(
        self, prompts: Sequence[str], params: ParamsOfAll = None, **named: Any
    ) -> Generator[tuple[int, GenerationChunk], None, None]:
        """Yield the chunks of `generate_batch` as they come, as pairs of the prompt's index and the chunk.

        Closing the iterator stops all answers and leaves the runtime usable.
        """
        asked_at = time.perf_counter()
        prompts = checked_prompts(prompts)
        params_of = params_of_each(prompts, params, named)
        for one in params_of:
            self._engine.check(one, is_completion=True)
        if self._workplace.num_sequences > 1:
            submissions = [self.submit(*one) for one in zip(prompts, params_of, strict=True)]
            return ClosableGenerator(read_all(submissions))
        self._batch.check(len(prompts))
        answers = [self._engine.constrained_answer(one) for one in params_of]
        with self._active.between_steps(), hints_for(self.spec.context_length):
            number = self._start()
            requests = [
                replace(
                    self._encoder.encode_text(prompt, self._model.context, one, asked_at),
                    answer=answer,
                )
                for prompt, one, answer in zip(prompts, params_of, answers, strict=True)
            ]
        return ClosableGenerator(self._active.run(number, self._batch.generate(requests)))

    def generate_batch(
        self, prompts: Sequence[str], params: ParamsOfAll = None, **named: Any
    ) -> list[GenerationResult]:
        """Continue several prompts at once, one forward pass for all of them; return the results in order.

        `params` are for all prompts, or a list with those of each; `named` are fields of `SamplingParams`, for all.
        The prefix that all prompts share is computed once. A greedy answer is that of its prompt alone, token for
        token, where `stats.batch["identical"]` is True. A batch takes memory beside the plan's, inside the
        budget: the KV cache of all its tokens. Where the runtime speculates, each sequence has drafts of its own;
        a draft model is not used. Raises `OverBudget`, before anything is allocated, where there is no room, and
        `BadOption` where the model or the attention runs one sequence at a time.
        """
        prompts = checked_prompts(prompts)
        params_of = params_of_each(prompts, params, named)
        chunks: list[list[GenerationChunk]] = [[] for _ in prompts]
        for index, chunk in self.stream_batch(prompts, params_of):
            chunks[index].append(chunk)
        return [
            GenerationResult.of(some, one.constraint)
            for some, one in zip(chunks, params_of, strict=True)
        ]

    def spells_control_tokens(self, prompt: str) -> bool:
        """Whether a raw prompt would have other tokens with `special=True`."""
        with self._active.between_steps():
            return self._encoder.spells_control_tokens(prompt)

    def count_tokens(self, text: str) -> int:
        """Return how many tokens a text has as a prompt."""
        with self._active.between_steps():
            return self._encoder.count(checked_prompt(text))

    def embed(
        self,
        texts: str | Sequence[str],
        *,
        pooling: str | None = None,
        normalize: bool = True,
        overflow: str = "error",
    ) -> Vectors:
        """Return the embeddings of texts: fp32, shape [number of texts, width]; one text is a list of one.

        `pooling` is "mean", "cls" or "last"; None is what the model's header says, and else "mean". With `normalize`
        each vector has the length 1. It ends a running answer; the KV cache stays. It takes memory beside the plan's,
        inside the budget, which limits how long a text may be; `overflow="truncate"` cuts longer ones. Models that
        only embed are opened with `Embedder`. Raises `TextTooLong`, `OverBudget` and `BadOption`.
        """
        config = EmbeddingConfig(pooling=pooling, overflow=overflow)
        require_pooled(pooling)
        texts = checked_texts(texts)
        self._start()
        with self._active.between_steps():
            num_cached = len(self._session.token_ids)
            return embedded(self._engine, num_cached, texts, config, normalize=normalize)

    def trim(self, level: str = "background") -> int:
        """Release memory, as a mobile system asks for it; return by how many bytes the resident set fell.

        "background" releases what nobody uses, "moderate" the prefix cache and garbage, too. "complete" also clears
        the KV cache, drops mapped weights, which the next prompt reads again, and ends a running answer. Answers stay
        the same. From another thread it waits for the forward pass that runs. Raises `BadOption` for an unknown
        level.
        """
        with self._active.between_steps():
            if isinstance(level, str) and level == "complete":
                self._start()  # ends the running answer
                self._workplace.discard_ended()
            return self._engine.trim(level).freed_bytes

    def _start(self) -> int:
        """End what runs, and return the number of the next generation; called between steps."""
        self._batch.close()
        return self._active.start()

    def _check_text(self, text: str) -> None:
        """Refuse a text that takes more memory to tokenise than planned; evict a KV cache in its way.

        Some pre-tokenizers take stack for every character of a long word. Such a text may be refused that another
        vocabulary tokenises.
        """
        self._engine.check_text_length(text)
        if self._engine.has_room_to_tokenise(text, len(self._session.token_ids)):
            return
        self._session.evict()
        self._engine.require_room_to_tokenise(text)

    def _generate(self, request: GenerationRequest) -> Generator[GenerationChunk, None, None]:
        context = self._engine.generation_context()
        loop = DecodeLoop(self._session, context, self._profiler)
        loop.add(GenerationState(0, request, self._model, context))
        for _, chunk in loop.run():
            yield chunk

    def _remembered(
        self, number: int, request: GenerationRequest, prompt: ChatPrompt
    ) -> Generator[GenerationChunk, None, None]:
        """Yield the answer and remember it for the next turn, unless another was started meanwhile."""
        token_ids: list[int] = []
        try:
            for chunk in self._active.run(number, self._generate(request)):
                if chunk.token_id is not None:
                    token_ids.append(chunk.token_id)
                yield chunk
        finally:
            if self._active.is_current(number):
                with self._active.between_steps():
                    if self._active.is_current(number):
                        self._encoder.remember(prompt, token_ids)

    def close(self, *, wait: bool = False) -> None:
        """Free the model when the forward pass that runs is done, also from another thread.

        An answer that is still read, or was submitted, ends with `RuntimeUnusable`; with `wait` the submitted ones are
        computed to their end before. Closing twice is allowed.
        """
        if wait and not self._active.is_forked:
            self._scheduler.wait()
        self._active.close()
        if not self._active.is_forked:
            self._scheduler.join()

    def _free(self) -> None:
        self._scheduler.close(
            RuntimeUnusable("the runtime was closed before the answer was complete")
        )
        self._workplace.close()
        self._batch.close()
        self._engine.close()

    def __del__(self) -> None:
        """Free the model of a runtime that nobody closed, with a `ResourceWarning`."""
        active = getattr(self, "_active", None)  # None where __init__ failed
        if active is not None:
            active.close_dropped(self.spec.name, self)

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
