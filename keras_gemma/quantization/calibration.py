"""How large the numbers are that each matrix is multiplied with, on given ids."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from keras import ops

from keras_gemma.config import GemmaConfig
from keras_gemma.model.matrix import Observed
from keras_gemma.model.transformer import hidden_states


def read_rows(calibration: Any, config: GemmaConfig) -> list[np.ndarray]:
    """Lists of ids, int32 `[1, T]` each; what is longer than the context is cut there.

    Raises:
        ValueError: strings, nothing, a list of one id, or ids outside the vocabulary.
        TypeError: no lists.
    """
    if not isinstance(calibration, Iterable):
        raise TypeError(
            "`calibration` must be a few texts, or lists of ids, or None. "
            f"Received: calibration={calibration!r:.80}"
        )
    rows = []
    for ids in calibration:
        row = np.asarray(ids)
        size = config.vocabulary_size
        if row.ndim != 1 or not row.size or row.dtype.kind not in "iu":
            raise ValueError(
                "`calibration` of a backbone must be lists of ids; a GemmaCausalLM with a "
                f"preprocessor takes texts. Received: {ids!r:.80}"
            )
        if row.min() < 0 or row.max() >= size:
            raise ValueError(
                f"`calibration` must hold ids from 0 to {size - 1}. Received: {ids!r:.80}"
            )
        if len(row) < 2:
            raise ValueError(
                "`calibration` must hold texts of two tokens or more, or lists of as many ids. "
                f"Received: one of the ids {row.tolist()} alone"
            )
        rows.append(row[None, : config.context_length].astype("int32"))
    if not rows:
        raise ValueError(
            "`calibration` must hold a few texts, or lists of ids; leave it out to quantize "
            "without. Received: none"
        )
    return rows


def mean_squares(backbone: Any, batches: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """The mean square of each column's factor, by the name of the matrix.

    An error in column `i` of a matrix changes a product by it times `x[i]`: where that is large,
    quantization should be careful. After Lin et al., 2023, arXiv:2306.00978, who rescale such
    columns; here their errors count more.

    Args:
        backbone: a `GemmaBackbone` in floating point.
        batches: ids, int `[B, T]`, without padding.

    Returns:
        For each matrix but the embedding, float32 `[in]`.
    """
    sums: dict[str, Any] = {}
    rows = 0

    def observed(name: str, packed: Any) -> Observed:
        def add_squares(x: Any) -> None:
            x = ops.reshape(ops.cast(x, "float32"), (-1, x.shape[-1]))
            sums[name] = sums.get(name, 0.0) + ops.convert_to_numpy(ops.sum(ops.square(x), axis=0))

        return Observed(packed, add_squares)

    config, weights = backbone.config, backbone.tensors()
    shapes = config.weight_shapes()
    for i, layer in enumerate(weights["layers"]):
        for part, packed in layer.items():
            if len(shapes[f"layers.{i}.{part}"]) == 2:
                layer[part] = observed(f"layers.{i}.{part}", packed)
    for ids in batches:
        rows += ids.size
        attended = ops.ones(ids.shape, dtype="bool")
        ids = ops.convert_to_tensor(ids)
        hidden_states(weights, ids, attended, config, backbone.compute_dtype)
    return {name: total / rows for name, total in sums.items()}
