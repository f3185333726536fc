"""Logit lens and attention maps.

The logit lens applies the model's final norm and head to the residual stream after each block
(nostalgebraist, 2020, "interpreting GPT: the logit lens").
"""

import dataclasses
from typing import Any

import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.losses import cross_entropy
from keras_gemma.model.head import final_norm
from keras_gemma.scoring.forward import logits_of
from keras_gemma.scoring.inputs import encode_short, read_integer, tokens_of
from keras_gemma.scoring.tracing import trace


@dataclasses.dataclass(frozen=True)
class LogitLens:
    """Next-token predictions of the residual stream at L + 1 stages and T positions."""

    tokens: list[str]
    """The T input tokens."""
    stages: list[str]
    """Names of the L + 1 stages: the embeddings and each block."""
    predictions: list[list[str]]
    """Most likely next tokens, `[L + 1][T]`."""
    probabilities: np.ndarray
    """Probabilities of `predictions`, float32 `[L + 1, T]`."""
    losses: np.ndarray
    """Losses of the actual next tokens, float32 `[L + 1, T - 1]`, in nats."""


def logit_lens(lm: Any, text: Any) -> LogitLens:
    """Applies the model's head to the residual stream before the first and after each block.

    Args:
        lm: A `GemmaCausalLM`.
        text: A string, or a list of token ids.

    Returns:
        A `LogitLens` with one prediction for each stage and position.

    Raises:
        ValueError: If the text is longer than the context.

    Example:

    ```python
    import keras_gemma

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    lens = keras_gemma.scoring.logit_lens(lm, "To be, or not to")
    for stage, row in zip(lens.stages, lens.predictions):
        print(stage, row)
    ```
    """
    ids = encode_short(lm, text)
    config, weights = lm.backbone.config, lm.backbone.tensors()
    residuals = trace(lm, ids, ["block.0.residual.before", "block.*.residual.after"])
    predictions, probabilities, losses = [], [], []
    targets = backend.to_tensor(ids[1:])
    for x in residuals.values():
        x = final_norm(x[0], weights["head"], config)
        logits = ops.stop_gradient(logits_of(x, weights, config))
        best = ops.argmax(logits, axis=-1)
        predictions.append(ops.convert_to_numpy(best))
        best_probabilities = ops.exp(-cross_entropy(logits, ops.cast(best, "int32")))
        probabilities.append(ops.convert_to_numpy(best_probabilities))
        losses.append(ops.convert_to_numpy(cross_entropy(logits[:-1], targets)))
    return LogitLens(
        tokens_of(lm, ids),
        ["embeddings", *(f"block {i}" for i in range(config.num_layers))],
        [tokens_of(lm, row) for row in predictions],
        np.stack(probabilities),
        np.stack(losses),
    )


@dataclasses.dataclass(frozen=True)
class AttentionMaps:
    """Attention weights of all heads of one block."""

    tokens: list[str]
    """The T input tokens."""
    layer: int
    """Index of the block, from 0."""
    weights: np.ndarray
    """Attention weights, float32 `[N, T, T]`: head, query position, key position."""


def attention_maps(lm: Any, text: Any, layer: int) -> AttentionMaps:
    """Returns the attention weights of every head of block `layer`.

    Args:
        lm: A `GemmaCausalLM`.
        text: A string, or a list of token ids.
        layer: Index of the block, from 0; negative indices count from the last block.

    Returns:
        The `AttentionMaps` of the block.

    Raises:
        ValueError: If the block does not exist, or the text is longer than the context.

    Example:

    ```python
    import keras_gemma

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    maps = keras_gemma.scoring.attention_maps(lm, "To be, or not to be", layer=-1)
    print(maps.layer, maps.weights.shape)
    ```
    """
    count = lm.backbone.config.num_layers
    advice = f"The model has {count} blocks."
    layer = read_integer("layer", layer, -count, count - 1, advice) % count
    ids = encode_short(lm, text)
    (weights,) = trace(lm, ids, f"block.{layer}.attention.weights").values()
    return AttentionMaps(tokens_of(lm, ids), layer, ops.convert_to_numpy(weights[0]))
