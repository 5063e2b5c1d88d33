"""GgufTreeModel: a GGUF model that verifies drafts with branches, with our attention over its cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowtide.models.gguf_model import GgufModel
from lowtide.models.gguf_options import LoadOptions
from lowtide.models.gguf_trees import CellHook, TreePasses
from lowtide.models.spec import ModelSpec
from lowtide.models.token_tree import TokenTree

if TYPE_CHECKING:
    from lowtide.models.model import RowLogits


class GgufTreeModel(GgufModel):
    """Takes trees until one could not be computed: then `verifies_trees` is False, and trunks are.

    `hook` has our attention in every layer, over one cache of all tokens. `options.sequences` is at least
    `options.verified_rows`: each leaf is a sequence.
    """

    _trees: TreePasses | None = None
    _num_written = 0
    _is_branched = False

    def __init__(self, spec: ModelSpec, options: LoadOptions, hook: CellHook) -> None:
        assert options.sequences >= options.verified_rows, "there are fewer sequences than leaves"
        super().__init__(spec, options)
        self.verifies_trees = True
        self._trees = TreePasses(
            self._library,
            self._context,
            hook,
            max_rows=self.max_verified_rows,
            num_layers=spec.num_layers,
        )

    def forward_tree(self, tree: TokenTree) -> RowLogits:
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
