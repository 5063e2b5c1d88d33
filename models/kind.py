"""What a model is for: decoders generate text, encoders embed it, encoder-decoders translate one text into another.

`models/gguf/header/spec.py` reads the kind from the header. Where the header does not say it, llama.cpp does, once it
has laid the model out (`models/gguf/header/kind.py`).
"""

from __future__ import annotations

from typing import Literal, Protocol

from lowtide.models.errors import UnsupportedModel

Kind = Literal["decoder", "encoder", "encoder-decoder"]
DECODER: Kind = "decoder"
ENCODER: Kind = "encoder"
ENCODER_DECODER: Kind = "encoder-decoder"
PURPOSES: dict[Kind, str] = {
    DECODER: "a decoder: it generates text, and `lowtide embed` embeds with it",
    ENCODER: "an encoder: `lowtide embed` embeds with it; it does not generate text",
    ENCODER_DECODER: "an encoder-decoder: `lowtide embed` embeds with its encoder; lowtide does not generate with it",
}
"""What a model of each kind is for, in words."""


class NamedModel(Protocol):
    """A model as far as errors name it."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def architecture(self) -> str:
        """Its architecture, as its header spells it."""


def require_decoder(spec: NamedModel, kind: Kind) -> None:
    """Raise `UnsupportedModel` for a model that lowtide cannot generate text with."""
    if kind == ENCODER:
        raise UnsupportedModel(
            f"{spec.name} is an encoder ({spec.architecture}), which embeds text but cannot generate it: use "
            "`lowtide embed`, or lowtide.Embedder in Python"
        )
    if kind == ENCODER_DECODER:
        raise UnsupportedModel(
            f"{spec.name} is an encoder-decoder ({spec.architecture}), and lowtide generates text with decoders "
            "only: pick a decoder, or embed with its encoder by `lowtide embed`"
        )
