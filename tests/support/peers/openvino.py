"""OpenVINO GenAI on a GGUF file, with its defaults; prompts are new, so that it reuses nothing of earlier ones."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

from .worker import THREADS


class OpenVino:
    """The pipeline with a prompt of token ids; `OPENVINO_OPTIONS` is a JSON object of more properties."""

    def __init__(self, path: Path) -> None:
        options = json.loads(os.environ.get("OPENVINO_OPTIONS", "{}"))
        self.pipeline: Any = genai.LLMPipeline(
            str(path), "CPU", INFERENCE_NUM_THREADS=THREADS, **options
        )

    def answer(self, token_ids: list[int], tokens: int) -> list[float]:
        """Read the prompt and decode; the pipeline writes down the time of each token."""
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = tokens
        config.ignore_eos, config.do_sample = True, False
        ids = np.array([token_ids], np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        started = time.perf_counter()
        metrics = self.pipeline.generate(inputs, config).perf_metrics
        first = started + metrics.get_ttft().mean / 1000
        written = metrics.raw_metrics.m_new_token_times  # milliseconds
        return [first + (ms - written[0]) / 1000 for ms in written]


def open_engine(path: Path, _context: int) -> OpenVino:
    """Open a GGUF file."""
    return OpenVino(path)
