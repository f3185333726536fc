"""How large the numbers are that each matrix is multiplied with, on given ids."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from keras import ops

from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.model.matrix import Observed


def mean_squares(backbone: GemmaBackbone, batches: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """The mean square of each column's factor, by the name of the matrix.

    An error in column `i` of a matrix changes a product by it times `x[i]`: where that is large,
    quantization should be careful. After Lin et al., 2023, arXiv:2306.00978, who rescale such
    columns; here their errors count more.

    Args:
        backbone: in floating point.
        batches: ids, int `[B, T]`, without padding.

    Returns:
        For each matrix but the embedding, float32 `[in]`.
    """
    sums: dict[str, Any] = {}
    rows = 0

    def observe(name: str, packed: Any) -> Observed:
        def see(x: Any) -> None:
            x = ops.reshape(ops.cast(x, "float32"), (-1, x.shape[-1]))
            sums[name] = sums.get(name, 0.0) + ops.convert_to_numpy(ops.sum(ops.square(x), axis=0))

        return Observed(packed, see)

    for ids in batches:
        rows += ids.size
        backbone.hidden_states(ids, observe)
    return {name: total / rows for name, total in sums.items()}
