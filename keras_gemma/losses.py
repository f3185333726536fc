"""Cross entropy of given ids, a chunk of positions at a time.

The logits of a long text are its largest array by far: 4 GB for 4,096 tokens of a vocabulary of
256,000. Here those of a chunk are the most that there are, in training too: a chunk's gradient is
taken while its logits are there, and what is kept of it is as small as the hidden states.

Knows the head, and neither a model nor how losses are averaged.
"""

from typing import Any

import keras
from keras import ops

from keras_gemma import backend
from keras_gemma.config import GemmaConfig
from keras_gemma.model.head import to_logits

LARGEST_CHUNK = 1 << 25
"""Logits at a time: 134 MB of float32, 128 positions of the largest vocabulary."""

TRAINED_CHUNK = 1 << 26
"""The same in training, where a few arrays of that size are there at a time."""

USUAL_BATCH = 4
"""Rows that a chunk is made for where their number is not known."""


def cross_entropy(logits: Any, target_ids: Any) -> Any:
    """`-log softmax(logits)[target]` in nats: `[..., V]` and `[...]` -> float32 `[...]`."""
    chosen = ops.take_along_axis(logits, target_ids[..., None], axis=-1)[..., 0]
    return ops.logsumexp(logits, axis=-1) - chosen


def loss_and_hits(
    x: Any,
    target_ids: Any,
    weights: Any,
    head: Any,
    config: GemmaConfig,
    training: bool = True,
    learn_head: bool = False,
) -> Any:
    """The sum of weighted losses, and of the weights where the target has the largest logit.

    Args:
        x: `[B, T, D]`, normalised.
        target_ids: int32 `[B, T]`.
        weights: float32 `[B, T]`.
        head: the packed embedding.
        training: take the gradient with respect to `x` along the way.
        learn_head: with respect to `head` as well, which is in floating point then.

    Returns:
        float32 `[2]`. Only the first has a gradient.
    """
    size = chunk_length(x.shape[0], x.shape[1], config.vocabulary_size)
    given = tuple(in_chunks(array, size) for array in (x, target_ids, weights))

    if not training:
        return ops.sum(backend.map(lambda chunk: _sums(*chunk, head, config), given), axis=0)

    @ops.custom_gradient
    def sums(x: Any, *trained: Any) -> Any:
        packed = trained[0] if trained else head
        chunks = (in_chunks(x, size), *given[1:])
        if trained:
            total, x_gradient, head_gradient = _with_head_gradient(chunks, packed, config)
        else:
            total, x_gradient = backend.map(
                lambda chunk: _with_gradient(*chunk, packed, config)[:2], chunks
            )
            total, head_gradient = ops.sum(total, axis=0), None
        x_gradient = out_of_chunks(x_gradient, x)

        def gradient(*args: Any, upstream: Any = None) -> Any:
            factor = (args[0] if upstream is None else upstream)[0]
            found = ops.cast(x_gradient * ops.cast(factor, x_gradient.dtype), x.dtype)
            if head_gradient is None:
                return found
            return found, ops.cast(head_gradient * factor, packed.dtype)

        return total, gradient

    return sums(x, head) if learn_head else sums(x)


def chunk_length(rows: int | None, length: int | None, vocabulary_size: int) -> int | None:
    """Positions of each row in a chunk: a power of two, or all; None where those are not known."""
    if length is None:
        return None
    most = TRAINED_CHUNK // (vocabulary_size * (rows or USUAL_BATCH))
    size = 1 << max(0, most.bit_length() - 1)
    return min(size, length)


def in_chunks(x: Any, size: int | None) -> Any:
    """`[B, T, ...]` -> `[chunks, B, size, ...]`, with zeros at the end."""
    if size is None:
        return x[None]
    length, rest = x.shape[1], list(x.shape[2:])
    if length % size:
        x = ops.pad(x, [(0, 0), (0, -length % size)] + [(0, 0)] * len(rest))
    x = ops.reshape(x, [ops.shape(x)[0], -(-length // size), size, *rest])
    return ops.swapaxes(x, 0, 1)


def out_of_chunks(chunks: Any, x: Any) -> Any:
    """The way back, to the shape of `x`."""
    n, size = chunks.shape[0], chunks.shape[2]
    if size is None:
        return chunks[0]
    whole = ops.reshape(ops.swapaxes(chunks, 0, 1), (ops.shape(x)[0], n * size, x.shape[-1]))
    return whole[:, : x.shape[1]]


def _sums(x: Any, target_ids: Any, weights: Any, head: Any, config: GemmaConfig) -> Any:
    """Both sums of a chunk, `[2]`."""
    logits = to_logits(x, head, config.final_logit_soft_cap)
    chosen = ops.take_along_axis(logits, target_ids[..., None], axis=-1)[..., 0]
    hits = ops.cast(chosen >= ops.max(logits, axis=-1), "float32")
    losses = ops.logsumexp(logits, axis=-1) - chosen
    return ops.stack([ops.sum(weights * losses), ops.sum(weights * hits)])


def _with_gradient(
    x: Any, target_ids: Any, weights: Any, head: Any, config: GemmaConfig
) -> tuple[Any, Any, Any]:
    """The sums of a chunk, and the loss's gradient by `x` and by the product with the head."""
    losses, hits, change = backend.cross_entropy(
        backend.matmul(x, head), target_ids, config.final_logit_soft_cap
    )
    x_gradient = backend.matmul_transposed(change, head)
    factor = ops.cast(weights, keras.backend.standardize_dtype(x.dtype))[..., None]
    sums = ops.stack([ops.sum(weights * losses), ops.sum(weights * hits)])
    return sums, x_gradient * factor, change


def _with_head_gradient(chunks: Any, head: Any, config: GemmaConfig) -> tuple[Any, Any, Any]:
    """The sums of all chunks, and the gradients by `x`, in chunks, and by the head, float32."""
    rows = (-1, config.hidden_dim)

    def step(i: Any, state: Any) -> Any:
        total, x_gradient, head_gradient = state
        x, target_ids, weights = (array[i] for array in chunks)
        sums, found, change = _with_gradient(x, target_ids, weights, head, config)
        change = change * ops.cast(weights, change.dtype)[..., None]
        change = ops.reshape(change, (-1, config.vocabulary_size))
        added = ops.matmul(ops.transpose(change), ops.reshape(x, rows))
        here = ops.expand_dims(ops.equal(ops.arange(chunks[0].shape[0]), i), (1, 2, 3))
        return (
            total + sums,
            ops.where(here, found[None], x_gradient),
            head_gradient + ops.cast(added, "float32"),
        )

    nothing = ops.zeros((2,)), ops.zeros_like(chunks[0]), ops.zeros_like(head, dtype="float32")
    return ops.fori_loop(0, chunks[0].shape[0], step, nothing)
