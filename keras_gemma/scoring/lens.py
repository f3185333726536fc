"""What the model would say if it ended early, and where its heads look.

The logit lens reads the residual after each block with the model's own final norm and head
(nostalgebraist, 2020, "interpreting GPT: the logit lens").
"""

import dataclasses
from typing import Any

import numpy as np
from keras import ops

from keras_gemma.model.normalization import rms_normalize
from keras_gemma.scoring.forward import logits_of
from keras_gemma.scoring.inputs import encode_short, tokens_of, whole_number
from keras_gemma.scoring.losses import cross_entropy
from keras_gemma.scoring.tracing import trace


@dataclasses.dataclass(frozen=True)
class LogitLens:
    """The next token by each of L + 1 residuals, at each of T positions."""

    tokens: list[str]
    """The T tokens read."""
    stages: list[str]
    """L + 1 names: the embeddings, and each block."""
    predictions: list[list[str]]
    """`[L + 1][T]`, the likeliest next token."""
    probabilities: np.ndarray
    """float32 `[L + 1, T]`, its probability."""
    losses: np.ndarray
    """float32 `[L + 1, T - 1]`, of the tokens that did follow, in nats."""


def logit_lens(lm: Any, text: Any) -> LogitLens:
    """Read the residual before the first block and after each block with the model's head.

    Args:
        lm: a `GemmaCausalLM`.
        text: a string, or its ids.

    Raises:
        ValueError: a text longer than the context.

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
    seen = trace(lm, ids, ["block.0.residual.before", "block.*.residual.after"])
    predicted, probabilities, losses = [], [], []
    targets = ops.convert_to_tensor(ids[1:])
    for x in seen.values():
        x = rms_normalize(x[0], weights["head"]["final_norm"], config.layer_norm_epsilon)
        logits = ops.stop_gradient(logits_of(x, weights, config))
        best = ops.argmax(logits, axis=-1)
        predicted.append(ops.convert_to_numpy(best))
        likelihoods = ops.exp(-cross_entropy(logits, ops.cast(best, "int32")))
        probabilities.append(ops.convert_to_numpy(likelihoods))
        losses.append(ops.convert_to_numpy(cross_entropy(logits[:-1], targets)))
    return LogitLens(
        tokens_of(lm, ids),
        ["embeddings", *(f"block {i}" for i in range(config.num_layers))],
        [tokens_of(lm, row) for row in predicted],
        np.stack(probabilities),
        np.stack(losses),
    )


@dataclasses.dataclass(frozen=True)
class AttentionMaps:
    """Where the heads of one block look."""

    tokens: list[str]
    """The T tokens read."""
    layer: int
    """The block, from 0."""
    weights: np.ndarray
    """float32 `[N, T, T]`: head, the position that looks, the position looked at."""


def attention_maps(lm: Any, text: Any, layer: int) -> AttentionMaps:
    """The attention weights of every head of block `layer`.

    Args:
        lm: a `GemmaCausalLM`.
        text: a string, or its ids.
        layer: from 0; negative ones count from the last.

    Raises:
        ValueError: no such layer; a text longer than the context.

    Example:

    ```python
    import keras_gemma

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    maps = keras_gemma.scoring.attention_maps(lm, "To be, or not to be", layer=-1)
    print(maps.layer, maps.weights.shape)
    ```
    """
    count = lm.backbone.config.num_layers
    remark = f": the model has {count} blocks"
    layer = whole_number("layer", layer, -count, count - 1, remark) % count
    ids = encode_short(lm, text)
    (weights,) = trace(lm, ids, f"block.{layer}.attention.weights").values()
    return AttentionMaps(tokens_of(lm, ids), layer, ops.convert_to_numpy(weights[0]))
