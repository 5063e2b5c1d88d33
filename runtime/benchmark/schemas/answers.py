"""One greedy answer that follows a schema: by lowtide's own loop, or by one that asks another engine."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from lowtide.attention.evaluation.divergence import extend
from lowtide.models.errors import BadOption
from lowtide.runtime.benchmark.schemas.engines import FREE, PEERS, PeerModel, Refused
from lowtide.runtime.generation.loop import DecodeLoop
from lowtide.runtime.generation.state import GenerationRequest, GenerationState
from lowtide.runtime.kv.session import KVSession
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.options import SamplingParams
from lowtide.runtime.structured.formats import JsonSchema


def own_answer(
    engine: Engine, session: KVSession, request: GenerationRequest, schema: Any, name: str
) -> dict[str, Any]:
    """Return an answer of lowtide's loop, without the schema where `name` is that of free decoding."""
    started = time.perf_counter()
    if name != FREE:
        params = SamplingParams(
            max_tokens=request.params.max_tokens, temperature=0, constraint=JsonSchema(schema)
        )
        try:
            request = replace(request, params=params, answer=engine.constrained_answer(params))
        except BadOption as error:
            return _refused(str(error))
    context = engine.generation_context()
    loop = DecodeLoop(session, context)
    loop.add(GenerationState(0, request, engine.model, context))
    times, chunks = list[float](), []
    for _, chunk in loop.run():
        times.append(time.perf_counter())
        chunks.append(chunk)
    return {
        "text": "".join(chunk.text for chunk in chunks),
        "tokens": sum(chunk.token_id is not None for chunk in chunks),
        "first_token_s": times[0] - started,
        "seconds": times[-1] - times[0],
        "refused": None,
    }


def peer_answer(
    engine: Engine, request: GenerationRequest, schema: Any, name: str
) -> dict[str, Any]:
    """Return an answer that another engine holds to the schema, with the same passes of the model."""
    model, controller = engine.model, engine.controller
    vocabulary = engine.vocabulary
    started = time.perf_counter()
    peer_model = PeerModel(vocabulary, getattr(model.tokenizer, "vocabulary", None))
    try:
        matcher = PEERS[name][1](schema, peer_model)
    except Refused as error:
        return _refused(str(error))
    token_ids, times = list[int](), list[float]()
    try:
        model.truncate(0)
        extend(model, controller, request.token_ids[:-1])
        next_id = request.token_ids[-1]
        while len(token_ids) < (request.params.max_tokens or 0):
            controller.begin_decode()
            chosen = matcher.choose(model.forward((next_id,)))
            times.append(time.perf_counter())
            if chosen is None or chosen in vocabulary.end_ids:
                break
            matcher.advance(chosen)
            token_ids.append(chosen)
            next_id = chosen
    finally:
        matcher.close()
    return {
        "text": vocabulary.decode(token_ids).decode("utf-8", errors="replace"),
        "tokens": len(times),
        "first_token_s": times[0] - started,
        "seconds": times[-1] - times[0],
        "refused": None,
    }


def _refused(reason: str) -> dict[str, Any]:
    shortened = reason.partition(" at /")[0].removeprefix("the JSON schema cannot be enforced: ")
    none: dict[str, Any] = {"text": "", "tokens": 0, "first_token_s": 0.0, "seconds": 0.0}
    return {**none, "refused": shortened[:80]}
