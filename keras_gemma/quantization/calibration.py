"""Calibration: mean squared activations of each matrix on representative token ids."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.config import GemmaConfig
from keras_gemma.model.matrix import Observed
from keras_gemma.model.transformer import hidden_states


def read_rows(calibration: Any, config: GemmaConfig) -> list[np.ndarray]:
    """Returns int32 `[1, T]` for each list of ids, truncated to the context length."""
    if not isinstance(calibration, Iterable):
        raise TypeError(
            "`calibration` must be an iterable of texts or of lists of token ids, or None. "
            f"Received: calibration={calibration!r:.80}"
        )
    rows = []
    for ids in calibration:
        row, size = np.asarray(ids), config.vocabulary_size
        if row.ndim != 1 or not row.size or row.dtype.kind not in "iu":
            raise ValueError(
                "`calibration` of a backbone must contain lists of token ids. Only a GemmaCausalLM "
                f"with a preprocessor accepts texts. Received: {ids!r:.80}"
            )
        if row.min() < 0 or row.max() >= size:
            raise ValueError(
                f"`calibration` must contain ids from 0 to {size - 1}. Received: {ids!r:.80}"
            )
        if len(row) < 2:
            raise ValueError(
                "Each text or list of ids in `calibration` must have at least two tokens. "
                f"Received: {row.tolist()}"
            )
        rows.append(row[None, : config.context_length].astype("int32"))
    if not rows:
        raise ValueError(
            "`calibration` must not be empty. Omit it to quantize without calibration. "
            f"Received: calibration={calibration!r:.80}"
        )
    return rows


def mean_squares(backbone: Any, batches: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the mean squared input of each column for ids `[B, T]` without padding.

    The means are float32 `[in]`, by the name of each matrix except the embedding. An error in
    column `i` of a matrix is multiplied by `x[i]`, so errors in columns with large inputs matter
    most. Lin et al., 2023, arXiv:2306.00978, rescale such columns; here their errors get a larger
    weight.
    """
    sums: dict[str, Any] = {}
    rows = 0

    def add_squares(name: str, x: Any) -> None:
        x = ops.reshape(ops.cast(x, "float32"), (-1, x.shape[-1]))
        sums[name] = sums.get(name, 0.0) + ops.convert_to_numpy(ops.sum(ops.square(x), axis=0))

    config, weights = backbone.config, backbone.tensors()
    shapes = config.weight_shapes()
    for i, layer in enumerate(weights["layers"]):
        for part, packed in layer.items():
            name = f"layers.{i}.{part}"
            if len(shapes[name]) == 2:
                layer[part] = Observed(packed, partial(add_squares, name))
    for ids in batches:
        rows += ids.size
        attended = ops.ones(ids.shape, dtype="bool")
        ids = backend.to_tensor(ids)
        hidden_states(weights, ids, attended, config, backbone.compute_dtype)
    return {name: total / rows for name, total in sums.items()}
