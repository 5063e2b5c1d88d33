"""GGUF's vocabulary -> tokenizer.json and tokenizer_config.json, as the `tokenizers` library reads them.

Merges of pairs, found again from the scores of SentencePiece's pieces.

SentencePiece's byte-pair models join the two neighbours whose joint piece has the highest score; a list of
merges that stands in the order of these scores joins the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowtide.models.convert.shape import Architecture, HeaderKeys
from lowtide.models.errors import BadModelFile, UnsupportedModel

NORMAL = 1


def merges_by_score(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
    """Return every pair of normal pieces that are a third one, the highest score first."""
    ids = {
        text: i for i, (text, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == NORMAL
    }
    found = []
    for whole, token_id in ids.items():
        for end in range(1, len(whole)):
            left, right = whole[:end], whole[end:]
            if left in ids and right in ids:
                found.append((-scores[token_id], token_id, ids[left], ids[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


TOKENS, KINDS = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
BYTE_PAIRS, PIECES = "gpt2", "llama"
BLANK = "▁"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
PATTERNS = {"llama-bpe": _LLAMA3, "qwen2": _QWEN2}
"""How texts are cut before pairs are merged, by "tokenizer.ggml.pre"; others have GPT-2's pattern."""
SINGLE_DIGITS = frozenset({"smollm"})
GPT2 = frozenset({"gpt-2", "default", *SINGLE_DIGITS})
BEGINNING_FIRST = frozenset({"llama-bpe"})
"""Byte-pair vocabularies that begin a text with a token of their own where the header does not say."""
ENDS = frozenset(
    "<|im_end|> <|eot_id|> <|eom_id|> <|endoftext|> <|end_of_text|> <|end|> <|return|> <|call|> "
    "<end_of_turn> <end_of_utterance> <EOT> _<EOT> [EOT] [EOS] </s> <|file_sep|> <file_sep> "
    "<|repo_name|> <reponame>".split()
)
"""Tokens that end an answer, and are control tokens, whatever the header says, as llama.cpp has it."""


class GgufVocabulary:
    """The vocabulary in a header; raises `UnsupportedModel` for kinds that have no tokenizer.json."""

    def __init__(self, keys: HeaderKeys) -> None:
        self._keys = keys
        self.tokens: list[str] = keys.items(TOKENS, str)
        kinds: list[int] = keys.items(KINDS, int) or [NORMAL] * len(self.tokens)
        self.model = keys.get("tokenizer.ggml.model")
        self._before = keys.get("tokenizer.ggml.pre", "default")
        if not self.tokens or len(kinds) != len(self.tokens):
            raise BadModelFile(
                f"{keys.path}: its tokens and their types do not agree; fetch it again"
            )
        pairs = zip(self.tokens, kinds, strict=True)
        self.kinds = [CONTROL if text in ENDS else kind for text, kind in pairs]
        if self.model not in (BYTE_PAIRS, PIECES):
            raise self._unsupported(f"its vocabulary is {self.model!r}, gpt2 or llama")
        if self.model == BYTE_PAIRS and self._before not in GPT2 | set(PATTERNS):
            known = ", ".join(sorted(GPT2 | set(PATTERNS)))
            raise self._unsupported(f"its texts are cut by {self._before!r}, one of {known}")

    def _unsupported(self, reason: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self._keys.path} cannot be converted: {reason} is wanted; run the GGUF file itself"
        )

    def special(self, name: str) -> int | None:
        """Return the id of "bos", "eos", "unknown" or "padding", None where there is none."""
        value = self._keys.get(f"tokenizer.ggml.{name}_token_id")
        return value if isinstance(value, int) and 0 <= value < len(self.tokens) else None

    def text(self, name: str) -> str | None:
        """Return the text of a special token."""
        token_id = self.special(name)
        return None if token_id is None else self.tokens[token_id]

    @property
    def end_ids(self) -> list[int]:
        """The tokens that end an answer; the header's own first."""
        stated = [self.special(name) for name in ("eos", "eot", "eom")]
        known = [token_id for token_id, text in enumerate(self.tokens) if text in ENDS]
        return list(dict.fromkeys(i for i in (*stated, *known) if i is not None))

    @property
    def begins_texts(self) -> bool:
        """Whether a text begins with the token "bos"."""
        default = self.model == PIECES or self._before in BEGINNING_FIRST
        return bool(self._keys.get("tokenizer.ggml.add_bos_token", default))

    @property
    def _prefixes_blank(self) -> bool:
        return bool(self._keys.get("tokenizer.ggml.add_space_prefix", self.model == PIECES))

    def tokenizer_json(self) -> dict[str, Any]:
        """Return the content of tokenizer.json."""
        parts = self._of_bytes() if self.model == BYTE_PAIRS else self._of_pieces()
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added_tokens(),
            **parts,
            "post_processor": self._post_processor(),
        }

    def tokenizer_config(self, architecture: Architecture, context_length: int) -> dict[str, Any]:
        """Return the content of tokenizer_config.json, the chat template included."""
        texts = {
            "bos_token": self.text("bos"),
            "eos_token": self.text("eos"),
            "unk_token": self.text("unknown"),
            "pad_token": self.text("padding"),
        }
        template = self._keys.get("tokenizer.chat_template")
        return {
            "add_bos_token": self.begins_texts,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": context_length,
            "tokenizer_class": architecture.tokenizer_class,
            **{name: text for name, text in texts.items() if text is not None},
            **({"chat_template": template} if isinstance(template, str) else {}),
        }

    def _added_tokens(self) -> list[dict[str, Any]]:
        return [
            {
                "id": token_id,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != USER_DEFINED,
            }
            for token_id, (text, kind) in enumerate(zip(self.tokens, self.kinds, strict=True))
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]

    def _vocabulary(self) -> dict[str, int]:
        """Return ids by text; of tokens with the same text the first one."""
        ids: dict[str, int] = {}
        for token_id, text in enumerate(self.tokens):
            ids.setdefault(text, token_id)
        return ids

    def _model(self, merges: list[tuple[str, str]], **settings: Any) -> dict[str, Any]:
        return {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            **settings,
            "vocab": self._vocabulary(),
            "merges": [list(merge) for merge in merges],
        }

    def _of_bytes(self) -> dict[str, Any]:
        merges = [self._halves(text) for text in self._keys.items("tokenizer.ggml.merges", str)]
        pattern = PATTERNS.get(self._before)
        by_bytes = {
            "type": "ByteLevel",
            "add_prefix_space": self._prefixes_blank,
            "trim_offsets": True,
            "use_regex": pattern is None,
        }
        steps: list[dict[str, Any]] = []
        if self._before in SINGLE_DIGITS:
            steps = [{"type": "Digits", "individual_digits": True}]
        elif pattern is not None:
            steps = [
                {
                    "type": "Split",
                    "pattern": {"Regex": pattern},
                    "behavior": "Isolated",
                    "invert": False,
                }
            ]
        return {
            # Qwen's own composes letters and accents first; llama.cpp, whose answers these are, does not.
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, by_bytes]},
            "decoder": {**by_bytes, "use_regex": True},
            "model": self._model(self._possible(merges), ignore_merges=self._before == "llama-bpe"),
        }

    def _halves(self, text: str) -> tuple[str, str]:
        left, blank, right = text.partition(" ")
        if not (left and blank and right):
            raise BadModelFile(f"{self._keys.path}: {text!r} is no merge; fetch the file again")
        return left, right

    def _possible(self, merges: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Leave out merges of or to what is no token: they never happen, and `tokenizers` refuses them."""
        known = set(self.tokens)
        return [
            (left, right)
            for left, right in merges
            if left in known and right in known and left + right in known
        ]

    def _of_pieces(self) -> dict[str, Any]:
        """SentencePiece's byte pairs: blanks are letters, bytes stand for what has no piece."""
        scores = self._keys.items("tokenizer.ggml.scores", float)
        if len(scores) != len(self.tokens):
            raise BadModelFile(
                f"{self._keys.path}: its tokens and scores do not agree; fetch it again"
            )
        blanks: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
        normaliser = blanks
        decoders: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": BLANK}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if self._prefixes_blank:
            prepended = {"type": "Prepend", "prepend": BLANK}
            normaliser = {"type": "Sequence", "normalizers": [prepended, blanks]}
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        return {
            "normalizer": normaliser,
            "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": self._model(
                merges_by_score(self.tokens, scores, self.kinds),
                unk_token=self.text("unknown"),
                fuse_unk=True,
                byte_fallback=True,
            ),
        }

    def _post_processor(self) -> dict[str, Any] | None:
        token_id, text = self.special("bos"), self.text("bos")
        if not self.begins_texts or text is None:
            return None
        first = {"SpecialToken": {"id": text, "type_id": 0}}
        return {
            "type": "TemplateProcessing",
            "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                first,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": text, "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {text: {"id": text, "ids": [token_id], "tokens": [text]}},
        }
