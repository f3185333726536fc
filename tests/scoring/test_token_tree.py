"""The tree of tokens, replayed chunk by chunk: what each node sees is the beginning of its text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_gemma.scoring.token_tree import token_tree

pytestmark = pytest.mark.once

TEXTS = st.lists(
    st.lists(st.integers(0, 2), min_size=2, max_size=9).flatmap(
        lambda ids: st.tuples(st.just(ids), st.integers(1, len(ids) - 1))
    ),
    min_size=1,
    max_size=12,
)


def replay(tree, size):
    """Returns what each node sees, by following the cache as the model's program does."""
    seen, cache, before = [], [], []
    for chunk in tree.chunks(size):
        cache = [cache[i] if i >= 0 else before[-1 - i] for i in chunk.path]
        before = chunk.token_ids.tolist()
        for shared, visible in zip(chunk.shared, chunk.visible, strict=True):
            own = [token for token, is_seen in zip(before, visible, strict=True) if is_seen]
            seen.append(cache[:shared] + own)
        assert [len(tokens) - 1 for tokens in seen[chunk.first :]] == chunk.positions.tolist()
        assert (tree.nodes[chunk.pairs] >= chunk.first).all()
        assert (tree.nodes[chunk.pairs] < chunk.first + len(before)).all()
    return seen


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.integers(1, 7))
def test_each_scored_token_follows_the_beginning_of_its_text(texts, size):
    tree = token_tree([np.array(ids, "int32") for ids, _ in texts], [n for _, n in texts])
    seen = replay(tree, size)
    pairs = zip(tree.nodes, tree.targets, tree.texts, strict=True)
    found = sorted((text, tuple(seen[node]), target) for node, target, text in pairs)
    expected = sorted(
        (i, tuple(ids[:end]), ids[end])
        for i, (ids, scored) in enumerate(texts)
        for end in range(len(ids) - scored, len(ids))
    )
    assert found == expected


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_each_beginning_is_read_once(texts):
    tree = token_tree([np.array(ids, "int32") for ids, _ in texts], [n for _, n in texts])
    beginnings = {tuple(ids[: i + 1]) for ids, _ in texts for i in range(len(ids) - 1)}
    assert tree.num_nodes == len(beginnings)
    assert sorted(map(tuple, replay(tree, 4))) == sorted(beginnings)


def test_no_texts():
    tree = token_tree([], [])
    assert tree.num_nodes == 0 and list(tree.chunks(4)) == []
