"""RowBatch: the rows of one llama.cpp pass over one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class RowBatch:
    """llama.cpp's batch, allocated once for passes of up to `max_rows` rows."""

    def __init__(self, api: Any, max_rows: int) -> None:
        self._api = api
        self.struct = api.llama_batch_init(max_rows, 0, 1)
        for row in range(max_rows):
            self.struct.n_seq_id[row] = 1
            self.struct.seq_id[row][0] = 0

    def fill(self, token_ids: Sequence[int], position: int, *, every_row: bool) -> None:
        """Put the tokens in, at consecutive positions; logits are asked of every row or of the last."""
        num_rows = len(token_ids)
        struct = self.struct
        struct.n_tokens = num_rows
        for row, token_id in enumerate(token_ids):
            struct.token[row] = token_id
            struct.pos[row] = position + row
            struct.logits[row] = every_row or row == num_rows - 1

    def free(self) -> None:
        """Give its memory back."""
        self._api.llama_batch_free(self.struct)
