"""Kernels of the contract for PyTorch on CPU, as loops of Inductor.

In a compiled block, one row times a matrix is an elementwise product and a sum. Inductor turns both
into one parallel loop over the weight, at twice the speed of the library's product.
"""

import torch
from torch import Tensor

from keras_gemma.backend import packing
from keras_gemma.backend.reference import LOWEST

MAX_ROWS_IN_LOOP = 4
"""Maximum rows for which Inductor's product and sum are faster than the library's product."""

WEIGHT_FIRST = range(16, 65)
"""Rows for which the library is faster with the weight as its first operand: 630 to 830 GFLOP/s
instead of 370 to 540 at 16 and 32 rows. From 128 rows, both reach 800 to 950."""


def materialize(x: Tensor) -> Tensor:
    """Returns `x` and makes Inductor store it.

    Otherwise Inductor repeats the computation of `x`, such as a norm, for each row of the weight:
    63 GB/s instead of 79.
    """
    return x.as_strided(x.shape, x.stride())


def few_rows(rows: Tensor, packed: Tensor) -> Tensor:
    """Multiplies `rows [R, in]` -> `[R, out]` with products and sums, one loop in Inductor.

    For several rows, the loop reads four parts of the weight in parallel and uses each loaded piece
    of `rows` four times. Sums of more than 4096 numbers are split into blocks, because Inductor's
    own long sums are more precise than float32 needs and four times slower.
    """
    out, length = packed.shape
    parts = 4 if len(rows) > 1 and out % 4 == 0 else 1
    blocks = packing.count_blocks(packed.shape, "matrix")
    shape = (blocks, length // blocks) if blocks > 1 else (length,)

    def dot(weight: Tensor, row: Tensor) -> Tensor:
        y = (weight.float() * row.float()).sum(-1)
        return y.sum(-1) if blocks > 1 else y

    weights = packed.view(parts, out // parts, *shape)
    products = [torch.cat([dot(w, row) for w in weights]) for row in rows.reshape(-1, *shape)]
    return torch.stack(products).to(rows.dtype)


def attend_one_query(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scale: float, soft_cap: float | None
) -> Tensor:
    """Same as `reference.attend`, for T = 1. Reads keys and values once, without float32 copies."""
    b, _, n, h = query.shape
    k = key.shape[2]
    queries = (query.float() * scale).view(b, 1, k, n // k, h).unbind(3)  # (B, 1, K, H) each
    logits = torch.stack([(key.float() * q).sum(-1) for q in queries], -1)  # (B, S, K, G)
    if soft_cap is not None:
        logits = torch.tanh(logits / soft_cap) * soft_cap
    visible = mask.view(b, -1, 1, 1)
    weights = torch.where(visible, logits, LOWEST).softmax(1)
    weights = torch.where(visible, weights, 0.0).unbind(-1)  # (B, S, K) each
    heads = torch.stack([(value.float() * w[..., None]).sum(1) for w in weights], 2)
    return heads.view(b, 1, n, h).to(value.dtype)  # from (B, K, G, H)
