"""GgufTreeModel: a GGUF model that verifies draft trees in one llama.cpp pass.

Every leaf of a tree is a llama.cpp sequence, and a row belongs to all sequences that have their leaf behind
it, so that it attends to its own path. The rows of the trunk lie in the slots where they would lie without
branches. A row of a branch that is accepted is copied over the trunk's row at its depth: the KV cache then
equals that of decoding token by token.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lowtide.models.draft_tree import TokenTree
from lowtide.models.gguf.llama_cpp import LlamaLibrary
from lowtide.models.gguf.model import GgufModel, GraphKernels
from lowtide.models.gguf.parameters import LoadOptions
from lowtide.models.gguf.sequences import BatchKernels
from lowtide.models.model import SequenceSlots
from lowtide.models.spec import ModelSpec

if TYPE_CHECKING:
    from lowtide.models.model import Logits2D


class TreePasses:
    """Passes over draft trees of up to `batch_size` rows, in a context of as many sequences."""

    def __init__(
        self,
        library: LlamaLibrary,
        context: Any,
        kernels: BatchKernels,
        *,
        batch_size: int,
        num_layers: int,
    ) -> None:
        self._library, self._api = library, library.api
        self._context, self._kernels = context, kernels
        self._num_layers = num_layers
        self._memory = self._api.llama_get_memory(context)
        self._batch: Any = self._api.llama_batch_init(batch_size, 0, batch_size)
        self._tree = TokenTree((), ())
        self._first_slot = 0

    def compute(self, tree: TokenTree, num_tokens: int) -> bool:
        """Compute a tree, whose trunk comes first, behind `num_tokens` tokens, with the logits of all rows.

        Afterwards the trunk is in the KV cache, and its branches can be committed. Returns False where
        llama.cpp failed or put tokens into other slots; the caller then removes what the pass wrote.
        """
        leaves = tree.leaves()
        # The trunk's leaf is llama.cpp's sequence 0, as in every other pass.
        leaves.sort(key=lambda leaf: leaf != tree.trunk_rows - 1)
        self._tree, self._first_slot = tree, num_tokens
        self._fill(tree, leaves)
        for sequence in range(1, len(leaves)):
            self._api.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)
        refused_before = self._kernels.layouts_refused
        self._kernels.set_batch_layout(self._slots(tree))
        try:
            with self._library.collected_errors():
                code = self._library.decode(self._context, self._batch)
        finally:
            self._kernels.set_batch_layout(None)
            for sequence in range(1, len(leaves)):
                self._api.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        if code != 0 or self._kernels.layouts_refused > refused_before:
            return False
        return self._kernels.copy_slot(num_tokens, num_tokens) == self._num_layers

    def commit_branch(self, row: int) -> None:
        """Copy a branch's row of the last tree over the trunk's row at its depth."""
        depth = len(self._tree.path(row)) - 1
        if row != depth:
            self._kernels.copy_slot(self._first_slot + row, self._first_slot + depth)

    def _fill(self, tree: TokenTree, leaves: Sequence[int]) -> None:
        batch = self._batch
        sequences = [list[int]() for _ in tree.token_ids]
        for sequence, leaf in enumerate(leaves):
            for row in tree.path(leaf):
                sequences[row].append(sequence)
        for row, depth in enumerate(tree.depths()):
            batch.token[row] = tree.token_ids[row]
            batch.pos[row] = self._first_slot + depth
            batch.n_seq_id[row] = len(sequences[row])
            for i, sequence in enumerate(sequences[row]):
                batch.seq_id[row][i] = sequence
            batch.logits[row] = True
        batch.n_tokens = len(tree)

    def _slots(self, tree: TokenTree) -> SequenceSlots:
        runs = list(tree.runs())
        return SequenceSlots(
            num_shared=self._first_slot,
            num_rows=tuple(map(len, runs)),
            own=tuple(array("i", self._path_slots(tree, run[-1])) for run in runs),
        )

    def _path_slots(self, tree: TokenTree, row: int) -> list[int]:
        return [self._first_slot + ancestor for ancestor in tree.path(row)]

    def close(self) -> None:
        """Free the batch; closing twice is allowed."""
        if self._batch is not None:
            self._api.llama_batch_free(self._batch)
            self._batch = None


class GgufTreeModel(GgufModel):
    """Computes draft trees; after the first failure `verifies_trees` is False and only trunks are computed.

    `kernels` compute attention in every layer, over one KV cache of all tokens. `options.sequences` must be
    at least `options.verify_batch`: each leaf is a sequence.
    """

    _trees: TreePasses | None = None
    _has_branches = False

    def __init__(self, spec: ModelSpec, options: LoadOptions, kernels: GraphKernels) -> None:
        assert options.sequences >= options.verify_batch, "there are fewer sequences than leaves"
        super().__init__(spec, options, kernels)
        self.verifies_trees = True
        self._trees = TreePasses(
            self._library,
            self._context,
            kernels,
            batch_size=self.max_verify_batch,
            num_layers=spec.num_layers,
        )

    def forward_tree(self, tree: TokenTree) -> Logits2D:
        """Append a tree's trunk and compute its branches beside it; the trunk alone after a failure."""
        self._has_branches = self._trees is not None and tree.trunk_rows < len(tree)
        if self._trees is None or not self._has_branches:
            return super().forward_tree(tree)
        self._check_tokens(tree.token_ids)
        self._check_verify_batch(len(tree))
        self._num_written = self._num_tokens + len(tree)
        if self._trees.compute(tree, self._num_tokens):
            self._num_tokens += tree.trunk_rows
            logits = self._all_logits(len(tree))
            self._require_numbers(logits, tree.token_ids[: tree.trunk_rows])
            return logits
        self._disable_trees()
        self._remove_from(self._num_tokens)
        return super().forward_tree(tree)

    def commit_branch(self, row: int) -> None:
        """Copy a branch's row over the trunk's."""
        if self._trees is not None and self._has_branches:
            self._trees.commit_branch(row)

    def close(self) -> None:
        """Free the context and the batch for trees."""
        self._disable_trees()
        super().close()

    def _disable_trees(self) -> None:
        self.verifies_trees = False
        if self._trees is not None:
            self._trees.close()
            self._trees = None
