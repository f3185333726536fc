"""Log-probabilities of texts, in a TensorFlow graph."""

from typing import Any

import tensorflow as tf

from keras_gemma.export.graph.prefill import Model, capacity_for, prefill
from keras_gemma.losses import MAX_SCORED_LOGITS, losses_and_hits
from keras_gemma.model.head import head


def score(
    weights: dict[str, Any], texts: tf.RaggedTensor, start: tf.Tensor, model: Model
) -> dict[str, tf.Tensor]:
    """Returns the scores of the tokens of texts `[B, (T)]` from index `start [B]`, at least 1.

    Returns:
        `log_probability`: float32 `[B]`, the sum over these tokens, in nats.
        `token_count`: int32 `[B]`, the number of these tokens.
        `is_greedy`: bool `[B]`, True if each of these tokens is the most likely one.
    """
    config = model.config
    token_ids, lengths = texts.to_tensor(), tf.cast(texts.row_lengths(), tf.int32)
    capacity = capacity_for(tf.shape(token_ids)[1], config)
    next_ids = tf.pad(token_ids[:, 1:], [(0, 0), (0, 1)])

    def on_chunk(x: tf.Tensor, chunk_start: tf.Tensor, scores: Any) -> Any:
        total, greedy = scores
        size = tf.shape(x)[1]
        index = chunk_start + tf.range(size)[None] + 1
        is_scored = tf.logical_and(index >= start[:, None], index < lengths[:, None])
        targets = next_ids[:, chunk_start : chunk_start + size]
        logits = head(x, weights["head"], config)
        loss, most_likely = losses_and_hits(logits, targets)
        total -= tf.reduce_sum(tf.where(is_scored, loss, 0.0), axis=1)
        return total, greedy & tf.reduce_all(most_likely | ~is_scored, axis=1)

    initial = tf.zeros_like(lengths, tf.float32), tf.ones_like(lengths, tf.bool)
    chunk_positions = MAX_SCORED_LOGITS // config.vocabulary_size
    (total, greedy), _ = prefill(
        weights, token_ids, model, capacity, initial, on_chunk, chunk_positions
    )
    count = tf.maximum(lengths - start, 0)
    return {"log_probability": total, "token_count": count, "is_greedy": greedy}
