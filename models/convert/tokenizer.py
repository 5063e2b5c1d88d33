"""Writes GGUF's vocabulary as tokenizer.json and tokenizer_config.json, for the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowtide.models.convert.shape import Architecture, HeaderKeys
from lowtide.models.errors import BadModelFile, UnsupportedModel

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
"""How texts are split before pairs are merged, by "tokenizer.ggml.pre"; others use GPT-2's pattern."""
SINGLE_DIGITS = frozenset({"smollm"})
GPT2 = frozenset({"gpt-2", "default", *SINGLE_DIGITS})
ADDS_BOS = frozenset({"llama-bpe"})
"""Byte-pair vocabularies that put BOS before a text where the header does not say."""
ENDS = frozenset(
    "<|im_end|> <|eot_id|> <|eom_id|> <|endoftext|> <|end_of_text|> <|end|> <|return|> <|call|> "
    "<end_of_turn> <end_of_utterance> <EOT> _<EOT> [EOT] [EOS] </s> <|file_sep|> <file_sep> "
    "<|repo_name|> <reponame>".split()
)
"""Control tokens that end an answer whatever the header says, as in llama.cpp."""


class GgufVocabulary:
    """The vocabulary in a GGUF header; raises `UnsupportedModel` for kinds without a tokenizer.json."""

    def __init__(self, keys: HeaderKeys) -> None:
        self._keys = keys
        self.tokens: list[str] = keys.items(TOKENS, str)
        kinds: list[int] = keys.items(KINDS, int) or [NORMAL] * len(self.tokens)
        self.model = keys.get("tokenizer.ggml.model")
        self._pre = keys.get("tokenizer.ggml.pre", "default")
        if not self.tokens or len(kinds) != len(self.tokens):
            raise BadModelFile(
                f"{keys.path}: it has another number of tokens than of token types; fetch it again"
            )
        pairs = zip(self.tokens, kinds, strict=True)
        self.kinds = [CONTROL if text in ENDS else kind for text, kind in pairs]
        if self.model not in (BYTE_PAIRS, PIECES):
            raise self._unsupported(
                f"its vocabulary is {self.model!r}; only gpt2 and llama can be converted"
            )
        if self.model == BYTE_PAIRS and self._pre not in GPT2 | set(PATTERNS):
            known = ", ".join(sorted(GPT2 | set(PATTERNS)))
            raise self._unsupported(
                f"its pre-tokenizer is {self._pre!r}; only {known} can be converted"
            )

    def _unsupported(self, reason: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self._keys.path} cannot be converted: {reason}; run the GGUF file itself"
        )

    def special(self, name: str) -> int | None:
        """Return the id of "bos", "eos", "unknown" or "padding"; None where there is none."""
        value = self._keys.get(f"tokenizer.ggml.{name}_token_id")
        return value if isinstance(value, int) and 0 <= value < len(self.tokens) else None

    def text(self, name: str) -> str | None:
        """Return the text of a special token."""
        token_id = self.special(name)
        return None if token_id is None else self.tokens[token_id]

    @property
    def end_ids(self) -> list[int]:
        """The tokens that end an answer, those of the header first."""
        from_header = [self.special(name) for name in ("eos", "eot", "eom")]
        known = [token_id for token_id, text in enumerate(self.tokens) if text in ENDS]
        return list(dict.fromkeys(i for i in (*from_header, *known) if i is not None))

    @property
    def adds_bos(self) -> bool:
        """Whether a text begins with BOS."""
        default = self.model == PIECES or self._pre in ADDS_BOS
        return bool(self._keys.get("tokenizer.ggml.add_bos_token", default))

    @property
    def _adds_space(self) -> bool:
        return bool(self._keys.get("tokenizer.ggml.add_space_prefix", self.model == PIECES))

    def tokenizer_json(self) -> dict[str, Any]:
        """Return the content of tokenizer.json."""
        parts = self._byte_level() if self.model == BYTE_PAIRS else self._sentence_pieces()
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
            "add_bos_token": self.adds_bos,
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
        """Return ids by text; the first one of tokens with the same text."""
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

    def _byte_level(self) -> dict[str, Any]:
        merges = [
            self._split_merge(text) for text in self._keys.items("tokenizer.ggml.merges", str)
        ]
        pattern = PATTERNS.get(self._pre)
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": self._adds_space,
            "trim_offsets": True,
            "use_regex": pattern is None,
        }
        steps: list[dict[str, Any]] = []
        if self._pre in SINGLE_DIGITS:
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
            # Qwen's own tokenizer composes letters and accents first; llama.cpp, which this must equal, does not.
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, byte_level]},
            "decoder": {**byte_level, "use_regex": True},
            "model": self._model(
                self._possible_merges(merges), ignore_merges=self._pre == "llama-bpe"
            ),
        }

    def _split_merge(self, text: str) -> tuple[str, str]:
        left, blank, right = text.partition(" ")
        if not (left and blank and right):
            raise BadModelFile(f"{self._keys.path}: {text!r} is not a merge; fetch the file again")
        return left, right

    def _possible_merges(self, merges: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Drop merges that involve a text which is not a token: they never apply, and `tokenizers` refuses them."""
        known = set(self.tokens)
        return [
            (left, right)
            for left, right in merges
            if left in known and right in known and left + right in known
        ]

    def _sentence_pieces(self) -> dict[str, Any]:
        """Return SentencePiece's byte-pair model: spaces are letters, and bytes spell what has no piece."""
        scores = self._keys.items("tokenizer.ggml.scores", float)
        if len(scores) != len(self.tokens):
            raise BadModelFile(
                f"{self._keys.path}: it has another number of tokens than of scores; fetch it again"
            )
        blanks: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
        normaliser = blanks
        decoders: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": BLANK}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if self._adds_space:
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
        if not self.adds_bos or text is None:
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


def merges_by_score(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
    """Return every pair of normal pieces that form a third one, the highest score first.

    SentencePiece's byte-pair models join the two neighbours whose joint piece has the highest score, so a list of
    merges in the order of these scores joins the same.
    """
    ids = {
        text: i for i, (text, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == NORMAL
    }
    merges = []
    for whole, token_id in ids.items():
        for end in range(1, len(whole)):
            left, right = whole[:end], whole[end:]
            if left in ids and right in ids:
                merges.append((-scores[token_id], token_id, ids[left], ids[right], left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]
