"""Other engines of structured output, each as greedy decoding uses it: which token comes next, and what follows it.

None is needed by lowtide. An engine that is not installed is left out of the comparison.
"""

from __future__ import annotations

import ctypes
import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowtide.attention.bindings.legal_tokens import best_legal
from lowtide.models.gguf.llama_cpp import llama_library
from lowtide.runtime.structured.vocabulary import TokenVocabulary

if TYPE_CHECKING:
    from lowtide.models.model import Logits


class Refused(Exception):
    """The engine does not take a schema; the message says why, in a few words."""


@dataclass(frozen=True, slots=True)
class PeerModel:
    """What the engines need of a model: the bytes of its tokens, and llama.cpp's own vocabulary, None for ONNX."""

    vocabulary: TokenVocabulary
    llama_vocabulary: Any


class PeerMatcher(ABC):
    """One answer of another engine."""

    @abstractmethod
    def choose(self, logits: Logits) -> int | None:
        """Return the legal token with the largest logit, an end token where the answer may end; None for none."""

    @abstractmethod
    def advance(self, token_id: int) -> None:
        """Append the token that was chosen, which is no end token."""

    def close(self) -> None:
        """Release what is held."""
        return


class _TokenData(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int32), ("logit", ctypes.c_float), ("p", ctypes.c_float))


class _TokenArray(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("selected", ctypes.c_int64),
        ("sorted", ctypes.c_bool),
    )


class LlamaGrammar(PeerMatcher):
    """llama.cpp's GBNF grammar of the schema, as llama-cpp-python writes it.

    As llama.cpp's own sampling does, it asks for the most probable token first and for all only if that is illegal.
    """

    def __init__(self, schema: Any, model: PeerModel) -> None:
        try:
            grammar = str(_gbnf_converter()(json.dumps(schema)))
        except Exception as error:  # the converter raises what Python's own functions raise
            raise Refused(f"no grammar: {type(error).__name__}") from None
        self._handle = self._function("llama_sampler_init_grammar", ctypes.c_void_p, 3)(
            model.llama_vocabulary, grammar.encode(), b"root"
        )
        if not self._handle:
            raise Refused("grammar not parsed")
        self._apply = self._function("llama_sampler_apply", None, 2)

    @staticmethod
    def _function(name: str, result: Any, num_arguments: int) -> Callable[..., Any]:
        kind = ctypes.CFUNCTYPE(result, *[ctypes.c_void_p] * num_arguments)
        return kind(llama_library().address(name))

    def choose(self, logits: Logits) -> int | None:
        """Return the legal token with the largest logit."""
        import numpy as np

        best = int(logits.argmax())
        for ids in (np.array([best]), np.arange(len(logits))):
            data = np.zeros(len(ids), [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
            data["id"], data["logit"] = ids, logits[ids]
            array = _TokenArray(data.ctypes.data, len(ids), -1, False)
            self._apply(self._handle, ctypes.addressof(array))
            if data["logit"].max() > -np.inf:
                return int(data["id"][data["logit"].argmax()])
        return None

    def advance(self, token_id: int) -> None:
        """Append a token."""
        accept = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32)
        accept(llama_library().address("llama_sampler_accept"))(self._handle, token_id)

    def close(self) -> None:
        """Free the grammar."""
        self._function("llama_sampler_free", None, 1)(self._handle)


@functools.cache
def _gbnf_converter() -> Callable[[str], str]:
    """Return llama-cpp-python's converter; importing its package would take llama.cpp's log over."""
    package = find_spec("llama_cpp")
    assert package is not None and package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / "llama_grammar.py"
    found = spec_from_file_location("llama_grammar_of_llama_cpp", path)
    assert found is not None and found.loader is not None
    module = module_from_spec(found)
    found.loader.exec_module(module)
    converter: Callable[[str], str] = module.json_schema_to_gbnf
    return converter


class OutlinesCore(PeerMatcher):
    """outlines-core: a table of states, made of the schema's regular expression and the vocabulary."""

    def __init__(self, schema: Any, model: PeerModel) -> None:
        outlines_core = import_module("outlines_core")
        try:
            pattern = outlines_core.json_schema.build_regex_from_schema(json.dumps(schema))
            index = outlines_core.Index(pattern, model.vocabulary.cached(_outlines_vocabulary))
        except Exception as error:  # the extension raises several kinds
            raise Refused(f"no index: {type(error).__name__}") from None
        self._guide = outlines_core.Guide(index)

    def choose(self, logits: Logits) -> int | None:
        """Return the legal token with the largest logit."""
        import numpy as np

        legal = np.asarray(self._guide.get_tokens(), np.int64)
        return int(legal[logits[legal].argmax()]) if len(legal) else None

    def advance(self, token_id: int) -> None:
        """Append a token."""
        self._guide.advance(token_id, False)


def _outlines_vocabulary(vocabulary: TokenVocabulary) -> Any:
    outlines_core = import_module("outlines_core")
    ids: dict[bytes | str, list[int]] = {}
    for token_id, piece in enumerate(vocabulary.all_bytes()):
        if piece and token_id not in vocabulary.end_ids:
            ids.setdefault(piece, []).append(token_id)
    return outlines_core.Vocabulary(vocabulary.end_ids[0], ids)


class XGrammar(PeerMatcher):
    """xgrammar, which computes a mask for every token."""

    def __init__(self, schema: Any, model: PeerModel) -> None:
        xgrammar = import_module("xgrammar")
        try:
            compiler, info = model.vocabulary.cached(_xgrammar_compiler)
            compiled = compiler.compile_json_schema(json.dumps(schema))
        except Exception as error:  # the extension raises several kinds
            raise Refused(f"not compiled: {type(error).__name__}") from None
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._mask = xgrammar.allocate_token_bitmask(1, info.vocab_size)

    def choose(self, logits: Logits) -> int | None:
        """Return the legal token with the largest logit."""
        self._matcher.fill_next_token_bitmask(self._mask)
        return best_legal(logits, self._mask.numpy().tobytes())

    def advance(self, token_id: int) -> None:
        """Append a token."""
        self._matcher.accept_token(token_id)


def _xgrammar_compiler(vocabulary: TokenVocabulary) -> tuple[Any, Any]:
    xgrammar = import_module("xgrammar")
    info = xgrammar.TokenizerInfo(
        vocabulary.all_bytes(),
        vocab_type=xgrammar.VocabType.RAW,
        vocab_size=vocabulary.num_tokens,
        stop_token_ids=list(vocabulary.end_ids),
    )
    return xgrammar.GrammarCompiler(info), info


PEERS: dict[str, tuple[str, Callable[[Any, PeerModel], PeerMatcher]]] = {
    "llama.cpp": ("llama_cpp", LlamaGrammar),
    "outlines-core": ("outlines_core", OutlinesCore),
    "xgrammar": ("xgrammar", XGrammar),
}
"""Each engine's package, and its matcher."""
FREE, OURS = "free", "lowtide"


def engines_here(engine: str) -> list[str]:
    """Return the engines that can be compared for a model of llama.cpp or onnxruntime, the free one first."""
    found = [
        name
        for name, (package, _) in PEERS.items()
        if find_spec(package) is not None and (name != "llama.cpp" or engine == name)
    ]
    return [FREE, OURS, *found]
