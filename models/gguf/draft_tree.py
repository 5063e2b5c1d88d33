"""GgufTreeModel: a GGUF model that verifies drafts with branches, with our attention over its cache.

TreePasses: a tree of drafts in one llama.cpp pass, behind one sequence.

Every leaf is a sequence of llama.cpp's, and a row is of all sequences whose leaves come after it: it
sees its own path. The rows of the trunk lie where they would lie without branches; a branch's row that
counts after all is copied over the trunk's at its depth: the cells then are the plain loop's. Knows no
drafts."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from lowtide.models.draft_tree import TokenTree
from lowtide.models.gguf.llama_cpp import LlamaLibrary
from lowtide.models.gguf.model import GgufModel, LoadOptions
from lowtide.models.model import SequenceSlots
from lowtide.models.spec import ModelSpec

if TYPE_CHECKING:
    from lowtide.models.model import Logits2D


class CellHook(Protocol):
    """What attends to a branch's rows over their own cells, and copies cells."""

    @property
    def layouts_refused(self) -> int:
        """How many times cells were found elsewhere than they were said to be."""

    def set_batch_layout(self, cells: SequenceSlots | None) -> None:
        """Say where the keys of the next pass's parts lie; None: it is one sequence's again."""

    def copy_cell(self, source: int, target: int) -> int:
        """Copy a cell over another in every layer, and return the number of layers."""


class TreePasses:
    """Passes of up to `batch_size` rows over a context of as many sequences."""

    def __init__(
        self,
        library: LlamaLibrary,
        context: Any,
        hook: CellHook,
        *,
        batch_size: int,
        num_layers: int,
    ) -> None:
        self._library, self._api = library, library.api
        self._context, self._hook = context, hook
        self._num_layers = num_layers
        self._memory = self._api.llama_get_memory(context)
        self._batch: Any = self._api.llama_batch_init(batch_size, 0, batch_size)
        self._tree = TokenTree((), ())
        self._first_cell = 0

    def compute(self, tree: TokenTree, num_tokens: int) -> bool:
        """Compute a tree whose trunk comes first, behind `num_tokens` tokens, the logits of all rows.

        Afterwards the trunk is in the cache and its branches can be `adopt`ed. False where llama.cpp failed
        or its cells lie elsewhere: what the pass left is to be forgotten then.
        """
        leaves = tree.leaves()
        # The trunk's leaf is llama.cpp's sequence 0, as in every other pass.
        leaves.sort(key=lambda leaf: leaf != tree.trunk_rows - 1)
        self._tree, self._first_cell = tree, num_tokens
        self._fill(tree, leaves)
        for sequence in range(1, len(leaves)):
            self._api.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)
        refused_before = self._hook.layouts_refused
        self._hook.set_batch_layout(self._cells(tree))
        try:
            with self._library.collected_errors():
                code = self._api.llama_decode(self._context, self._batch)
        finally:
            self._hook.set_batch_layout(None)
            for sequence in range(1, len(leaves)):
                self._api.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        if code != 0 or self._hook.layouts_refused > refused_before:
            return False
        return self._hook.copy_cell(num_tokens, num_tokens) == self._num_layers

    def adopt(self, row: int) -> None:
        """Have a branch's row of the last tree be the token at its depth, in the trunk's place."""
        depth = len(self._tree.path(row)) - 1
        if row != depth:
            self._hook.copy_cell(self._first_cell + row, self._first_cell + depth)

    def _fill(self, tree: TokenTree, leaves: Sequence[int]) -> None:
        batch = self._batch
        sequences = [list[int]() for _ in tree.token_ids]
        for sequence, leaf in enumerate(leaves):
            for row in tree.path(leaf):
                sequences[row].append(sequence)
        for row, depth in enumerate(tree.depths()):
            batch.token[row] = tree.token_ids[row]
            batch.pos[row] = self._first_cell + depth
            batch.n_seq_id[row] = len(sequences[row])
            for i, sequence in enumerate(sequences[row]):
                batch.seq_id[row][i] = sequence
            batch.logits[row] = True
        batch.n_tokens = len(tree)

    def _cells(self, tree: TokenTree) -> SequenceSlots:
        runs = list(tree.runs())
        return SequenceSlots(
            num_shared=self._first_cell,
            num_rows=tuple(map(len, runs)),
            own=tuple(array("i", self._path_cells(tree, run[-1])) for run in runs),
        )

    def _path_cells(self, tree: TokenTree, row: int) -> list[int]:
        return [self._first_cell + before for before in tree.path(row)]

    def close(self) -> None:
        """Free the batch; closing twice is allowed."""
        if self._batch is not None:
            self._api.llama_batch_free(self._batch)
            self._batch = None


class GgufTreeModel(GgufModel):
    """Takes trees until one could not be computed: then `verifies_trees` is False, and trunks are.

    `hook` has our attention in every layer, over one cache of all tokens. `options.sequences` is at least
    `options.verify_batch`: each leaf is a sequence.
    """

    _trees: TreePasses | None = None
    _num_written = 0
    _is_branched = False

    def __init__(self, spec: ModelSpec, options: LoadOptions, hook: CellHook) -> None:
        assert options.sequences >= options.verify_batch, "there are fewer sequences than leaves"
        super().__init__(spec, options)
        self.verifies_trees = True
        self._trees = TreePasses(
            self._library,
            self._context,
            hook,
            batch_size=self.max_verify_batch,
            num_layers=spec.num_layers,
        )

    def forward_tree(self, tree: TokenTree) -> Logits2D:
        """Append a tree's trunk and compute its branches beside it, where cells lie as we know them."""
        self._is_branched = self._trees is not None and tree.trunk_rows < len(tree)
        if self._trees is None or not self._is_branched:
            return super().forward_tree(tree)
        self._check_rows(tree.token_ids)
        self._check_verified(len(tree))
        self._num_written = self._num_tokens + len(tree)
        if self._trees.compute(tree, self._num_tokens):
            self._num_tokens += tree.trunk_rows
            return self._row_logits(len(tree))
        self._give_trees_up()
        self._forget_from(self._num_tokens)
        return super().forward_tree(tree)

    def adopt(self, row: int) -> None:
        """Copy a branch's row over the trunk's."""
        if self._trees is not None and self._is_branched:
            self._trees.adopt(row)

    def truncate(self, num_tokens: int) -> int:
        """Forget the tokens from `num_tokens` on, and what branches left behind them."""
        if self._num_written > self._num_tokens and self.on_cut is not None:
            self.on_cut(self._num_written, self._num_tokens)
        self._num_written = 0
        return super().truncate(num_tokens)

    def close(self) -> None:
        """Free the context and what trees took."""
        self._give_trees_up()
        super().close()

    def _give_trees_up(self) -> None:
        self.verifies_trees = False
        if self._trees is not None:
            self._trees.close()
            self._trees = None
