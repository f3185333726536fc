"""Many texts as one tree of tokens, so that the tokens that texts share are read once.

    prompt A, choices x and y z         a b c x         a - b - c - x
                                        a b c y z               |   y
    prompt B, choice x                  a b d               d
                                        (the last token of a text predicts nothing more)

The tree is read from root to leaves in chunks of nodes, in the order of a depth-first search. A
KV cache by depth holds the path to the next chunk: all nodes above the chunk's nodes that earlier
chunks have read. Knows no model.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Chunk(NamedTuple):
    """Nodes of a tree that are read together, after the nodes on the path in the cache."""

    token_ids: np.ndarray  # int32 [T]
    positions: np.ndarray  # int32 [T], the depth of each node
    shared: np.ndarray  # int32 [T], the number of nodes of the path that a node sees
    visible: np.ndarray  # bool [T, T], the nodes of this chunk that a node sees
    path: np.ndarray  # int32 [P]
    """Place of each node of the path after the chunk before: `i` is node `i` of that chunk's path,
    and `-1 - i` is node `i` of that chunk."""
    pairs: slice  # the scored pairs whose nodes are in this chunk
    first: int  # index of the first node


@dataclasses.dataclass(frozen=True)
class TokenTree:
    """Nodes in the order of a depth-first search, and the pairs of node and next token to score.

    The nodes above a node come before it, and the nodes below it follow it immediately.
    """

    token_ids: np.ndarray
    """Token of each node, int32 `[n]`."""
    positions: np.ndarray
    """Depth of each node, int32 `[n]`."""
    parents: np.ndarray
    """Index of the node above each node, int64 `[n]`; -1 for a root."""
    nodes: np.ndarray
    """Node of each scored pair, int64 `[P]`, ascending."""
    targets: np.ndarray
    """Next token of each scored pair, int32 `[P]`."""
    texts: np.ndarray
    """Index of the text of each scored pair, int64 `[P]`."""

    @property
    def num_nodes(self) -> int:
        """Number of tokens to read."""
        return len(self.token_ids)

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Yields chunks of `size` nodes; the last one may be shorter."""
        path = np.zeros(0, "int32")
        for first in range(0, self.num_nodes, size):
            nodes = slice(first, first + size)
            positions = self.positions[nodes]
            shared, visible = self._visible(first, len(positions))
            pairs = slice(*np.searchsorted(self.nodes, (first, first + len(positions))))
            needed = path[: shared.max()]
            yield Chunk(self.token_ids[nodes], positions, shared, visible, needed, pairs, first)
            # The path to the last node: the part that it sees in the cache, then its own part.
            own = np.flatnonzero(visible[-1]).astype("int32")
            path = np.concatenate([np.arange(shared[-1], dtype="int32"), -1 - own])

    def _visible(self, first: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns `shared` and `visible` of the chunk of `size` nodes from `first`."""
        visible = np.eye(size, dtype="bool")
        shared = self.positions[first : first + size].copy()
        for i, parent in enumerate(self.parents[first : first + size] - first):
            if parent >= 0:
                visible[i, :i] = visible[parent, :i]
                shared[i] = shared[parent]
        return shared, visible


def token_tree(texts: list[np.ndarray], num_scored: list[int]) -> TokenTree:
    """Builds the tree of `texts`, int32 `[n]` each.

    The last `num_scored[i]` tokens of text `i` are scored, each given the tokens before it. At
    least one token of a text comes before them.
    """
    order = sorted(range(len(texts)), key=lambda i: texts[i].astype(">i4").tobytes())
    path_tokens = np.zeros(max(map(len, texts), default=1), "int32")
    path_nodes = np.zeros(len(path_tokens), "int64")
    depth = num_nodes = 0
    token_ids, positions, parents = [], [], []
    nodes, targets, owners = [], [], []
    for i in order:
        read = texts[i][:-1]
        both = min(depth, len(read))
        differs = np.flatnonzero(path_tokens[:both] != read[:both])
        start = differs[0] if differs.size else both
        new = np.arange(num_nodes, num_nodes + len(read) - start)
        if new.size:
            token_ids.append(read[start:])
            positions.append(np.arange(start, len(read)))
            parents.append(
                np.concatenate([path_nodes[start - 1 : start] if start else [-1], new[:-1]])
            )
            path_tokens[start : len(read)] = read[start:]
            path_nodes[start : len(read)] = new
            num_nodes += len(new)
            depth = len(read)
        scored = slice(len(read) - num_scored[i], len(read))
        nodes.append(path_nodes[scored].copy())
        targets.append(texts[i][scored.start + 1 :])
        owners.append(np.full(num_scored[i], i))
    nodes = _joined(nodes, "int64")
    by_node = np.argsort(nodes, kind="stable")
    return TokenTree(
        _joined(token_ids, "int32"),
        _joined(positions, "int32"),
        _joined(parents, "int64"),
        nodes[by_node],
        _joined(targets, "int32")[by_node],
        _joined(owners, "int64")[by_node],
    )


def _joined(arrays: list[np.ndarray], dtype: str) -> np.ndarray:
    return np.concatenate([*arrays, np.zeros(0)]).astype(dtype)
