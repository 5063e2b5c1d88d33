"""Draft trees: which rows follow which, and their order for verification."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowtide.models.draft_tree import TEXT, TokenTree


@st.composite
def trees(draw: st.DrawFn, most: int = 12) -> TokenTree:
    """Return any tree; siblings may have the same token."""
    size = draw(st.integers(1, most))
    parents = tuple(draw(st.integers(TEXT, row - 1)) for row in range(size))
    return TokenTree(tuple(draw(st.integers(0, 5)) for _ in range(size)), parents)


def text_of(tree: TokenTree, row: int) -> tuple[int, ...]:
    return tuple(tree.token_ids[ancestor] for ancestor in tree.path(row))


@given(trees())
def test_the_trunk_is_a_longest_path_and_comes_first(tree: TokenTree) -> None:
    ordered = tree.trunk_first()
    longest = max(tree.depths()) + 1
    assert ordered.trunk_rows == longest
    assert ordered.parents[:longest] == tuple(range(TEXT, longest - 1))
    assert sorted(text_of(ordered, row) for row in range(len(tree))) == sorted(
        text_of(tree, row) for row in range(len(tree))
    )


@given(trees())
def test_runs_are_all_rows_in_order(tree: TokenTree) -> None:
    runs = list(tree.runs())
    assert [row for run in runs for row in run] == list(range(len(tree)))
    for run in runs:
        assert all(tree.parents[row] == row - 1 for row in run[1:])
        assert run[0] == 0 or tree.parents[run[0]] != run[0] - 1


@given(trees(), st.integers(0, 99))
def test_children_are_found_by_their_token(tree: TokenTree, token_id: int) -> None:
    whole = tree.with_root(token_id)
    assert whole.token_ids[0] == token_id and whole.parents[0] == TEXT
    for row in range(1, len(whole)):
        found = whole.child(whole.parents[row], whole.token_ids[row])
        assert found is not None and text_of(whole, found) == text_of(whole, row) and found <= row
    assert whole.child(0, 77) is None


@given(trees())
def test_leaves_and_the_first_path(
    tree: TokenTree,
) -> None:
    assert {row for leaf in tree.leaves() for row in tree.path(leaf)} == set(range(len(tree)))
    first = tree.first_path()
    for row in first:
        assert all(other > row for other in tree.later_siblings(row))
        siblings = [r for r, parent in enumerate(tree.parents) if parent == tree.parents[row]]
        assert siblings == [row, *tree.later_siblings(row)]
    assert tree.path(first[-1]) == first and first[-1] in tree.leaves()


def test_a_chain_and_its_first_rows_are_trees() -> None:
    chain = TokenTree.chain((4, 5, 6))
    assert chain.parents == (TEXT, 0, 1) and chain.trunk_rows == 3 and chain.leaves() == [2]
    assert chain.of_rows([0, 1]) == TokenTree.chain((4, 5))
    assert len(TokenTree.chain(())) == TokenTree.chain(()).trunk_rows == 0


@pytest.mark.parametrize("parents", [(0, 0), (TEXT, 1), (TEXT, -2), (TEXT,)])
def test_a_row_before_its_parent_is_refused(parents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="before its row"):
        TokenTree((1, 2), parents)
