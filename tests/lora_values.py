"""Adapters with random values, and their comparison."""

import numpy as np
from keras import ops

from tests.parity.pairs import IDS


def run(backbone, ids=IDS, **options):
    hidden = backbone({"token_ids": ids, "padding_mask": np.ones_like(ids)}, **options)
    return ops.convert_to_numpy(ops.cast(hidden, "float32"))


def fill(backbone, name="default", seed=1, size=0.1):
    """Fills an adapter with random numbers; returns the update of each matrix, `scale * B A`."""
    random = np.random.default_rng(seed)
    added = {}
    for matrix, linear in backbone.adapters.linears(name).items():
        low_rank = linear.low_ranks[name]
        a, b = (random.normal(0, size, tuple(v.shape)) for v in (low_rank.a, low_rank.b))
        low_rank.assign(a, b)
        added[matrix] = low_rank.scale * (b @ a)
    return added


def largest(actual, expected):
    """Returns the largest difference relative to the largest expected number."""
    return np.abs(actual - expected).max() / np.abs(expected).max()
