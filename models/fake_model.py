"""A Model with made-up logits and a byte vocabulary, for tests, examples and docs.

It has no weights. Its logits depend only on the tokens in its KV cache, so truncating and appending again
gives the same answers, as with a real model.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowtide.models.draft_tree import TokenTree
from lowtide.models.errors import ForwardError, SnapshotError
from lowtide.models.model import Model, SequenceBatch, SequenceSlice
from lowtide.models.sequence_slots import SlotTable
from lowtide.models.spec import ModelSpec, VocabularySpec
from lowtide.models.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lowtide.models.model import Logits, Logits2D

BOS, TURN_START, TURN_END = 256, 257, 258
NUM_TOKENS = 259
CERTAINTY = 30.0
_SNAPSHOT_MAGIC = b"fake"
_CONTROL_TEXTS = {BOS: "<bos>", TURN_START: "<|start|>", TURN_END: "<|end|>"}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


class ByteTokenizer(Tokenizer):
    """One token per byte, and three control tokens."""

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Return the bytes of `text`, after BOS where special tokens are added."""
        token_ids = [BOS] if add_special else []
        data = text.encode("utf-8", errors="replace")
        while data:
            control = next(
                (
                    token_id
                    for token_id, written in _CONTROL_TEXTS.items()
                    if parse_special and data.startswith(written.encode())
                ),
                None,
            )
            token_ids.append(data[0] if control is None else control)
            data = data[1 if control is None else len(_CONTROL_TEXTS[control]) :]
        return token_ids

    def token_bytes(self, token_id: int) -> bytes:
        """Return the byte itself; control tokens have none."""
        return bytes([token_id]) if token_id < BOS else b""

    def is_end(self, token_id: int) -> bool:
        """Whether the token ends a turn."""
        return token_id == TURN_END

    @property
    def special_texts(self) -> dict[str, str]:
        """The texts of the control tokens."""
        return {"bos_token": _CONTROL_TEXTS[BOS], "eos_token": _CONTROL_TEXTS[TURN_END]}


class FakeModel(Model):
    """Answers with `replies` in turn, one for each assistant turn of the prompt, cyclically.

    A prompt without turns is answered with the first reply, after its last newline. `rows` records the number
    of tokens of every forward pass, for tests of what was recomputed.
    """

    supports_snapshot = supports_copy = supports_batch = verifies_trees = True

    def __init__(
        self, replies: Sequence[str] = ("Hello.",), context: int = 512, batch_size: int = 64
    ) -> None:
        self.replies = [reply.encode() for reply in replies]
        self.context = context
        self.batch_size = self.max_verify_batch = batch_size
        self.tokenizer = ByteTokenizer()
        self.spec = fake_spec(context)
        self.rows: list[int] = []
        self._tokens: list[int] = []
        self._tree, self._tree_start = TokenTree((), ()), 0

    @property
    def num_tokens(self) -> int:
        """How many tokens are in the KV cache."""
        return len(self._tokens)

    def forward(self, token_ids: Sequence[int]) -> Logits:
        """Append the tokens; the logits point at the next byte of the reply."""
        if not 0 < len(token_ids) <= min(self.batch_size, self.context - len(self._tokens)):
            raise ForwardError(f"{len(token_ids)} tokens do not fit")
        self._tokens.extend(token_ids)
        self.rows.append(len(token_ids))
        return self._logits()

    def forward_rows(self, token_ids: Sequence[int]) -> Logits2D:
        """Append the tokens; the logits of each are those that it has alone."""
        import numpy as np

        if not 0 < len(token_ids) <= min(self.batch_size, self.context - len(self._tokens)):
            raise ForwardError(f"{len(token_ids)} tokens do not fit")
        self.rows.append(len(token_ids))
        rows = []
        for token_id in token_ids:
            self._tokens.append(token_id)
            rows.append(self._logits())
        return np.stack(rows)

    def forward_tree(self, tree: TokenTree) -> Logits2D:
        """Append the trunk; the logits of each row are those behind its path."""
        import numpy as np

        if not 0 < len(tree) <= min(self.batch_size, self.context - len(self._tokens)):
            raise ForwardError(f"{len(tree)} tokens do not fit")
        self.rows.append(len(tree))
        text, rows = self._tokens, []
        for row in range(len(tree)):
            self._tokens = [*text, *(tree.token_ids[ancestor] for ancestor in tree.path(row))]
            rows.append(self._logits())
        self._tokens = [*text, *tree.token_ids[: tree.trunk_rows]]
        self._tree, self._tree_start = tree, len(text)
        return np.stack(rows)

    def commit_branch(self, row: int) -> None:
        """Put the row's token at its depth."""
        depth = len(self._tree.path(row)) - 1
        self._tokens[self._tree_start + depth] = self._tree.token_ids[row]

    def _logits(self) -> Logits:
        import numpy as np

        noise = np.random.default_rng(self._tokens[-1]).standard_normal(NUM_TOKENS)
        logits: Logits = noise.astype(np.float32)
        logits[self._next_token()] += CERTAINTY
        return logits

    def _next_token(self) -> int:
        reply, position = self.replies[0], len(self._after_last(ord("\n")))
        assistant_turns = self._assistant_turns()
        if assistant_turns:
            reply = self.replies[(len(assistant_turns) - 1) % len(self.replies)]
            position = len(self._tokens) - assistant_turns[-1]
        return reply[position] if 0 <= position < len(reply) else TURN_END

    def _after_last(self, token_id: int) -> list[int]:
        reverse = self._tokens[::-1]
        return reverse[: reverse.index(token_id)] if token_id in reverse else reverse

    def _assistant_turns(self) -> list[int]:
        """Return the positions of the first tokens of the assistant's turns."""
        head = [TURN_START, *b"assistant\n"]
        return [
            start + len(head)
            for start, token in enumerate(self._tokens)
            if token == TURN_START and self._tokens[start : start + len(head)] == head
        ]

    def truncate(self, num_tokens: int) -> int:
        """Drop the tokens from `num_tokens` on."""
        del self._tokens[num_tokens:]
        return len(self._tokens)

    def snapshot_properties(self) -> dict[str, str]:
        """Return its name: all fake models have the same keys and values."""
        return {"model": self.spec.name}

    def save_kv(self, path: Path, token_ids: Sequence[int]) -> int:
        """Write the tokens, four bytes each: the KV cache holds nothing else."""
        return path.write_bytes(_SNAPSHOT_MAGIC + array("i", token_ids).tobytes())

    def load_kv(self, path: Path, num_bytes: int, num_tokens: int) -> list[int]:
        """Read the tokens."""
        self._tokens = []
        with path.open("rb") as file:
            snapshot = file.read(num_bytes)
        if not snapshot.startswith(_SNAPSHOT_MAGIC) or len(snapshot) != 4 + 4 * num_tokens:
            raise SnapshotError("the snapshot is not a fake model's")
        self._tokens = array("i", snapshot[len(_SNAPSHOT_MAGIC) :]).tolist()
        return self._tokens[:]

    def snapshot_bytes(self) -> int:
        """Return four bytes for the magic and four per token."""
        return 4 + 4 * len(self._tokens)

    def copy_kv(self, into: memoryview) -> None:
        """Copy the tokens."""
        snapshot = _SNAPSHOT_MAGIC + array("i", self._tokens).tobytes()
        if len(into) != len(snapshot):
            raise SnapshotError(f"the buffer has {len(into)} bytes; the copy takes {len(snapshot)}")
        into[:] = snapshot

    def put_kv(self, snapshot: memoryview, num_tokens: int) -> None:
        """Restore the tokens."""
        self._tokens = []
        magic = snapshot[: len(_SNAPSHOT_MAGIC)]
        if magic != _SNAPSHOT_MAGIC or len(snapshot) != 4 + 4 * num_tokens:
            raise SnapshotError("the snapshot is not a fake model's")
        self._tokens = array("i", bytes(snapshot[len(_SNAPSHOT_MAGIC) :])).tolist()

    def open_sequences(
        self, num_sequences: int, num_slots: int, max_logits: int | None = None
    ) -> SequenceBatch:
        """Return sequences, each of which is a model like this one."""
        return FakeSequences(self, num_sequences, num_slots, max_logits or num_sequences)

    def close(self) -> None:
        """Do nothing: there is nothing to free."""


class FakeSequences(SequenceBatch):
    """One fake model per sequence; every pass is recorded in the `rows` of the model that opened them."""

    def __init__(
        self, model: FakeModel, num_sequences: int, num_slots: int, max_logits: int
    ) -> None:
        self.num_sequences, self.num_slots = num_sequences, num_slots
        self.batch_size, self.max_logits = model.batch_size, max_logits
        self._rows = model.rows
        replies = [reply.decode() for reply in model.replies]
        self._models = [FakeModel(replies, num_slots) for _ in range(num_sequences)]
        self._table = SlotTable(num_sequences, num_slots)

    @property
    def num_free(self) -> int:
        """How many slots no sequence holds."""
        return self._table.num_free

    def num_held(self, sequences: Iterable[int], sequence: int, num_tokens: int) -> int:
        """Return how many slots these sequences hold together with the first tokens of another one."""
        return self._table.num_held(sequences, sequence, num_tokens)

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """Give the target the first tokens of the source."""
        self._table.copy_prefix(source, target, num_tokens)
        self._models[target]._tokens = self._models[source]._tokens[:num_tokens]

    def forward(self, slices: Sequence[SequenceSlice]) -> Logits2D:
        """Append the slices; the logits are those of each sequence alone."""
        import numpy as np

        num_new = sum(len(part.token_ids) for part in slices)
        if not 0 < num_new <= min(self.batch_size, self.num_free):
            raise ForwardError(f"{num_new} tokens do not fit")
        if sum(part.num_logits for part in slices) > self.max_logits:
            raise ForwardError(f"logits of more than {self.max_logits} tokens were requested")
        self._rows.append(num_new)
        logits = []
        for part in slices:
            model = self._models[part.sequence]
            self._table.append(part.sequence, len(part.token_ids))
            first_with_logits = len(part.token_ids) - part.num_logits
            for i, token_id in enumerate(part.token_ids):
                model._tokens.append(token_id)
                if i >= first_with_logits:
                    logits.append(model._logits())
        return np.stack(logits) if logits else np.empty((0, NUM_TOKENS), np.float32)

    def truncate(self, sequence: int, num_tokens: int) -> None:
        """Drop the sequence's tokens from `num_tokens` on."""
        self._table.truncate(sequence, num_tokens)
        self._models[sequence].truncate(num_tokens)

    def clear(self) -> None:
        """Drop all tokens of all sequences."""
        for sequence in range(self.num_sequences):
            self.truncate(sequence, 0)

    def close(self) -> None:
        """Do nothing: there is nothing to free."""


def fake_spec(context: int) -> ModelSpec:
    """Return the spec of a model of about a megabyte."""
    return ModelSpec(
        paths=(Path("fake.gguf"),),
        name="fake",
        architecture="fake",
        quantisation="F32",
        num_layers=2,
        embedding_width=64,
        feed_forward_width=(128, 128),
        num_heads=2,
        num_kv_heads=(1, 1),
        key_head_dim=32,
        value_head_dim=32,
        context_length=context,
        sliding_window=None,
        recurrent_state_bytes=0,
        vocabulary=VocabularySpec(num_tokens=NUM_TOKENS, num_merges=0, text_bytes=NUM_TOKENS),
        weight_bytes=1 << 20,
        file_bytes=1 << 20,
        tensor_types=frozenset({"F32"}),
        chat_template=CHAT_TEMPLATE,
        fingerprint="fake",
    )
