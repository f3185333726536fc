"""How likely given texts are, in a TensorFlow graph."""

from typing import Any

import tensorflow as tf

from keras_gemma.export.graph.prefill import Model, capacity_for, read
from keras_gemma.losses import MAX_SCORED_LOGITS
from keras_gemma.model.head import head


def score(
    weights: dict[str, Any], texts: tf.RaggedTensor, start: tf.Tensor, model: Model
) -> dict[str, tf.Tensor]:
    """What the model thinks of the tokens of texts `[B, (T)]` from `start [B]` on, 1 at least.

    Returns:
        `log_probability`, float32 `[B]`, the sum over these tokens, in nats; `token_count`, int32
        `[B]`, how many they are; `is_greedy`, bool `[B]`, whether each is the likeliest.
    """
    config = model.config
    token_ids, lengths = texts.to_tensor(), tf.cast(texts.row_lengths(), tf.int32)
    capacity = capacity_for(tf.shape(token_ids)[1], config)
    targets = tf.pad(token_ids[:, 1:], [(0, 0), (0, 1)])

    def look(x: tf.Tensor, first: tf.Tensor, known: Any) -> Any:
        total, greedy = known
        place = first + tf.range(tf.shape(x)[1])[None] + 1
        counts = tf.logical_and(place >= start[:, None], place < lengths[:, None])
        wanted = targets[:, first : first + tf.shape(x)[1]]
        logits = head(x, weights["head"], config)
        chosen = tf.gather(logits, wanted, axis=-1, batch_dims=2)
        lost = tf.reduce_logsumexp(logits, axis=-1) - chosen
        likeliest = chosen >= tf.reduce_max(logits, axis=-1)
        total -= tf.reduce_sum(tf.where(counts, lost, 0.0), axis=1)
        return total, greedy & tf.reduce_all(likeliest | ~counts, axis=1)

    nothing = tf.zeros_like(lengths, tf.float32), tf.ones_like(lengths, tf.bool)
    at_once = MAX_SCORED_LOGITS // config.vocabulary_size
    (total, greedy), _ = read(weights, token_ids, model, capacity, nothing, look, at_once)
    count = tf.maximum(lengths - start, 0)
    return {"log_probability": total, "token_count": count, "is_greedy": greedy}
