"""Logits or losses of every position of a text, with a hook at every layer."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.model.embedding import scale_embeddings
from keras_gemma.text.reading import to_ids

Intercept = Callable[[Any, int], Any]


def score(
    backbone: GemmaBackbone,
    token_ids: Any,
    padding_mask: Any = None,
    scoring_mode: str = "logits",
    layer_intercept_fn: Intercept | None = None,
    target_ids: Any = None,
) -> Any:
    """See `GemmaCausalLM.score`."""
    if scoring_mode not in ("logits", "loss"):
        raise ValueError(
            f"`scoring_mode` must be 'logits' or 'loss'. Received: scoring_mode={scoring_mode!r}"
        )
    if scoring_mode == "loss" and target_ids is None:
        raise ValueError(
            "`target_ids` must be given where scoring_mode='loss': the id that each position "
            "should have predicted, as `keras.ops.roll(token_ids, -1, axis=1)`."
        )
    if layer_intercept_fn is not None and not callable(layer_intercept_fn):
        raise ValueError(
            "`layer_intercept_fn` must be a function of the activations and the layer's index. "
            f"Received: {layer_intercept_fn!r}"
        )
    size = backbone.config.vocabulary_size
    token_ids = ops.convert_to_tensor(to_ids("token_ids", token_ids, 2, size))
    if padding_mask is None:
        padding_mask = ops.ones_like(token_ids, dtype="bool")
    padding_mask = ops.convert_to_tensor(padding_mask)
    if tuple(padding_mask.shape) != tuple(token_ids.shape):
        raise ValueError(
            "`padding_mask` must have the shape of `token_ids`. Received: padding_mask of shape "
            f"{tuple(padding_mask.shape)}, token_ids of shape {tuple(token_ids.shape)}"
        )
    if target_ids is not None:
        target_ids = ops.convert_to_tensor(to_ids("target_ids", target_ids, 2, size))
        if tuple(target_ids.shape) != tuple(token_ids.shape):
            raise ValueError(
                "`target_ids` must have the shape of `token_ids`. Received: target_ids of shape "
                f"{tuple(target_ids.shape)}, token_ids of shape {tuple(token_ids.shape)}"
            )

    def intercept(x: Any, layer: int) -> Any:
        if layer_intercept_fn is None:
            return x
        y = layer_intercept_fn(x, layer)
        if y is None or tuple(getattr(y, "shape", ())) != tuple(x.shape):
            raise ValueError(
                f"`layer_intercept_fn` must return a tensor of the shape it was given. At layer "
                f"{layer} it was given {tuple(x.shape)} and returned "
                f"{None if y is None else tuple(getattr(y, 'shape', ()))}"
            )
        return y

    x = intercept(backbone.token_embedding(token_ids), -1)
    x = scale_embeddings(x, backbone.config.embedding_scale)
    for layer, block in enumerate(backbone.transformer_layers):
        x = intercept(block(x, padding_mask=padding_mask), layer)
    logits = backbone.token_embedding(backbone.layer_norm(x), reverse=True)
    if scoring_mode == "logits":
        return logits
    return keras.ops.sparse_categorical_crossentropy(target_ids, logits, from_logits=True)
