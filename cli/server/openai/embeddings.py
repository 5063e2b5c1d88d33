"""`/v1/embeddings`: vectors of texts."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowtide.cli.server.errors import ApiError
from lowtide.cli.server.reading.fields import Fields
from lowtide.models.arguments.values import shown

if TYPE_CHECKING:
    from lowtide.runtime.embedding.passes import Vectors

MAX_TEXTS = 256
FORMATS = ("float", "base64")


@dataclass(frozen=True, kw_only=True)
class EmbeddingRequest:
    """A checked request for embeddings."""

    model: str | None
    texts: list[str]
    encoding: str = "float"
    dimensions: int | None = None

    @classmethod
    def of(cls, body: Any) -> EmbeddingRequest:
        """Read a request; raises `ApiError` for what is wrong, unknown or not supported."""
        fields = Fields(body)
        fields.ignore("user")
        value = fields.take("input")
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not 0 < len(texts) <= MAX_TEXTS:
            raise ApiError(
                400,
                f"input is {shown(value)}; it must be a text, or 1 to {MAX_TEXTS} texts",
                param="input",
            )
        if not all(isinstance(text, str) and text for text in texts):
            raise ApiError(
                400, "input has tokens, or a text without a character; send texts", param="input"
            )
        asked = cls(
            model=fields.text("model"),
            texts=texts,
            encoding=fields.choice("encoding_format", FORMATS) or "float",
            dimensions=fields.whole("dimensions", 1, 1 << 20),
        )
        fields.finish(["input", "model", "encoding_format", "dimensions"])
        return asked

    def answer(self, model: str, vectors: Vectors, num_tokens: int) -> dict[str, Any]:
        """Return the vectors in OpenAI's form; raises `ApiError` where they have another width than asked for."""
        width = vectors.shape[1]
        if self.dimensions not in (None, width):
            raise ApiError(
                400,
                f"dimensions is {self.dimensions}, but the vectors of {model} have {width}: leave it out",
                param="dimensions",
            )
        data = [
            {"object": "embedding", "index": i, "embedding": self._encoded(vector)}
            for i, vector in enumerate(vectors)
        ]
        used = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return {"object": "list", "model": model, "data": data, "usage": used}

    def _encoded(self, vector: Any) -> Any:
        if self.encoding == "base64":
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        return vector.tolist()
