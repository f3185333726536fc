"""Cross entropy of target ids, computed in chunks of positions.

The logits of a long text are by far its largest array: 4 GB for 4,096 tokens and a vocabulary of
256,000. Only the logits of one chunk are in memory at a time. Training computes the gradient of a
chunk together with its loss and keeps only the gradient with respect to the hidden states.

Knows the head, but nothing about models and averages of losses.
"""

from typing import Any

import keras
from keras import ops

from keras_gemma import backend
from keras_gemma.config import GemmaConfig
from keras_gemma.model.head import to_logits

MAX_SCORED_LOGITS = 1 << 25
"""Maximum number of logits in a chunk: 134 MB of float32, 128 positions of Gemma's vocabulary."""

MAX_TRAINED_LOGITS = 1 << 26
"""Maximum number of logits in a chunk of `loss_and_hits`, which needs several such arrays."""

DEFAULT_BATCH_SIZE = 4
"""Rows per chunk that are assumed if the batch size is unknown."""


def cross_entropy(logits: Any, target_ids: Any) -> Any:
    """Returns `-log softmax(logits)[target]` in nats: `[..., V]` and `[...]` -> float32 `[...]`."""
    return ops.logsumexp(logits, axis=-1) - _target_logits(logits, target_ids)


def losses_and_hits(logits: Any, target_ids: Any) -> tuple[Any, Any]:
    """Returns `cross_entropy` of each target, and True if the target is the most likely token.

    `[..., V]` and `[...]` -> float32 and bool `[...]`.
    """
    target_logits = _target_logits(logits, target_ids)
    losses = ops.logsumexp(logits, axis=-1) - target_logits
    return losses, target_logits >= ops.max(logits, axis=-1)


def token_losses(x: Any, target_ids: Any, head: Any, config: GemmaConfig) -> Any:
    """Returns the loss of each position. A gradient recomputes the logits.

    Args:
        x: Output of the final norm, `[B, T, D]`.
        target_ids: int32 `[B, T]`.
        head: Packed embedding. It is a constant: no gradient is computed for it.
        config: Config of the model.

    Returns:
        Losses in nats, float32 `[B, T]`.
    """

    def losses(x: Any, target_ids: Any) -> Any:
        return cross_entropy(to_logits(x, head, config.final_logit_soft_cap), target_ids)

    shape = ops.shape(target_ids)
    x, target_ids = (ops.reshape(a, (1, -1, *a.shape[2:])) for a in (x, target_ids))
    size = chunk_length(1, x.shape[1], config.vocabulary_size, MAX_SCORED_LOGITS)
    chunks = in_chunks(x, size), in_chunks(target_ids, size)
    chunk_losses = backend.map(lambda chunk: keras.remat(losses)(*chunk), chunks)
    return ops.reshape(out_of_chunks(chunk_losses, target_ids), shape)


def loss_and_hits(
    x: Any,
    target_ids: Any,
    weights: Any,
    head: Any,
    config: GemmaConfig,
    training: bool = True,
    learn_head: bool = False,
) -> Any:
    """Returns the sum of weighted losses, and of the weights of correct predictions.

    Args:
        x: Output of the final norm, `[B, T, D]`.
        target_ids: int32 `[B, T]`.
        weights: float32 `[B, T]`.
        head: Packed embedding.
        config: Config of the model.
        training: If True, computes the gradient with respect to `x` together with the losses.
        learn_head: If True, also computes the gradient with respect to `head`, which must not be
            quantized.

    Returns:
        float32 `[2]`. Only the first sum has a gradient.
    """
    size = chunk_length(x.shape[0], x.shape[1], config.vocabulary_size, MAX_TRAINED_LOGITS)
    chunks = tuple(in_chunks(array, size) for array in (x, target_ids, weights))

    if not training:
        return ops.sum(backend.map(lambda chunk: _sums(*chunk, head, config), chunks), axis=0)

    @ops.custom_gradient
    def sums(x: Any, *trained: Any) -> Any:
        packed = trained[0] if trained else head
        x_chunks = (in_chunks(x, size), *chunks[1:])
        if trained:
            total, x_gradient, head_gradient = _with_head_gradient(x_chunks, packed, config)
        else:
            total, x_gradient = backend.map(
                lambda chunk: _with_gradient(*chunk, packed, config)[:2], x_chunks
            )
            total, head_gradient = ops.sum(total, axis=0), None
        x_gradient = out_of_chunks(x_gradient, x)

        def gradient(*args: Any, upstream: Any = None) -> Any:
            factor = (args[0] if upstream is None else upstream)[0]
            scaled = ops.cast(x_gradient * ops.cast(factor, x_gradient.dtype), x.dtype)
            if head_gradient is None:
                return scaled
            return scaled, ops.cast(head_gradient * factor, packed.dtype)

        return total, gradient

    return sums(x, head) if learn_head else sums(x)


def chunk_length(
    rows: int | None, length: int | None, vocabulary_size: int, max_logits: int
) -> int | None:
    """Returns the number of positions of each row in a chunk: a power of two, or all positions.

    Args:
        rows: Batch size. `None` if unknown.
        length: Positions of a row. `None` if unknown; then the result is `None`.
        vocabulary_size: Logits per position.
        max_logits: Maximum number of logits in a chunk.
    """
    if length is None:
        return None
    limit = max_logits // (vocabulary_size * (rows or DEFAULT_BATCH_SIZE))
    return min(1 << max(0, limit.bit_length() - 1), length)


def in_chunks(x: Any, size: int | None) -> Any:
    """Splits `[B, T, ...]` into `[chunks, B, size, ...]`, with zeros at the end."""
    if size is None:
        return x[None]
    length, rest = x.shape[1], list(x.shape[2:])
    if length % size:
        x = ops.pad(x, [(0, 0), (0, -length % size)] + [(0, 0)] * len(rest))
    x = ops.reshape(x, [ops.shape(x)[0], -(-length // size), size, *rest])
    return ops.swapaxes(x, 0, 1)


def out_of_chunks(chunks: Any, x: Any) -> Any:
    """Inverse of `in_chunks`, with the shape of `x`."""
    n, size = chunks.shape[0], chunks.shape[2]
    if size is None:
        return chunks[0]
    shape = (ops.shape(x)[0], n * size, *x.shape[2:])
    return ops.reshape(ops.swapaxes(chunks, 0, 1), shape)[:, : x.shape[1]]


def _target_logits(logits: Any, target_ids: Any) -> Any:
    return ops.take_along_axis(logits, target_ids[..., None], axis=-1)[..., 0]


def _sums(x: Any, target_ids: Any, weights: Any, head: Any, config: GemmaConfig) -> Any:
    """Returns both sums of a chunk, `[2]`."""
    logits = to_logits(x, head, config.final_logit_soft_cap)
    losses, is_hit = losses_and_hits(logits, target_ids)
    hits = ops.cast(is_hit, "float32")
    return ops.stack([ops.sum(weights * losses), ops.sum(weights * hits)])


def _with_gradient(
    x: Any, target_ids: Any, weights: Any, head: Any, config: GemmaConfig
) -> tuple[Any, Any, Any]:
    """Returns the sums of a chunk, and the gradients with respect to `x` and its product.

    The gradient of the product with the head, `[B, size, V]`, is not multiplied by the weights.
    """
    losses, hits, change = backend.cross_entropy(
        backend.matmul(x, head), target_ids, config.final_logit_soft_cap
    )
    x_gradient = backend.matmul_transposed(change, head)
    factor = ops.cast(weights, keras.backend.standardize_dtype(x.dtype))[..., None]
    sums = ops.stack([ops.sum(weights * losses), ops.sum(weights * hits)])
    return sums, x_gradient * factor, change


def _with_head_gradient(chunks: Any, head: Any, config: GemmaConfig) -> tuple[Any, Any, Any]:
    """Returns the sums of all chunks, and the gradients of `x`, in chunks, and of the head."""
    rows = (-1, config.hidden_dim)

    def step(i: Any, state: Any) -> Any:
        total, x_gradient, head_gradient = state
        x, target_ids, weights = (array[i] for array in chunks)
        sums, chunk_gradient, change = _with_gradient(x, target_ids, weights, head, config)
        change = change * ops.cast(weights, change.dtype)[..., None]
        change = ops.reshape(change, (-1, config.vocabulary_size))
        added = ops.matmul(ops.transpose(change), ops.reshape(x, rows))
        is_chunk = ops.expand_dims(
            ops.equal(ops.arange(chunks[0].shape[0], dtype="int32"), i), (1, 2, 3)
        )
        return (
            total + sums,
            ops.where(is_chunk, chunk_gradient[None], x_gradient),
            head_gradient + ops.cast(added, "float32"),
        )

    initial = ops.zeros((2,)), ops.zeros_like(chunks[0]), ops.zeros_like(head, dtype="float32")
    return ops.fori_loop(0, chunks[0].shape[0], step, initial)
