"""onnxruntime-genai on an ONNX folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import onnxruntime_genai as genai

from .worker import THREADS


class OnnxGenai:
    """A new generator for each answer: an empty cache."""

    def __init__(self, folder: Path, context: int) -> None:
        config = genai.Config(str(folder))
        options = f'{{"intra_op_num_threads": {THREADS}}}'
        config.overlay(f'{{"model": {{"decoder": {{"session_options": {options}}}}}}}')
        self.model: Any = genai.Model(config)
        self.context = context

    def answer(self, token_ids: list[int], tokens: int) -> list[float]:
        """Read the prompt and decode."""
        params = genai.GeneratorParams(self.model)
        params.set_search_options(max_length=self.context, do_sample=False)
        generator = genai.Generator(self.model, params)
        generator.append_tokens(token_ids)
        times: list[float] = []
        while len(times) < tokens:
            generator.generate_next_token()
            times.append(time.perf_counter())
        return times


def open_engine(folder: Path, context: int) -> OnnxGenai:
    """Open a folder with a genai_config.json."""
    return OnnxGenai(folder, context)
