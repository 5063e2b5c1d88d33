"""Exact attention: llama.cpp's own kernels, or ours."""

from __future__ import annotations

from lowtide.attention.policy import AttentionPolicy


class Llama(AttentionPolicy):
    """llama.cpp's own kernels; nothing is hooked."""

    name = "llama"
    uses_hook = False


class Dense(AttentionPolicy):
    """Our exact kernels: a row's result depends neither on the batch it came in nor on the threads."""

    name = "dense"
