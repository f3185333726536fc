"""Cross entropy of target ids, computed in chunks of positions.

The logits of a long text are by far the largest array: 4 GB for 4,096 tokens and a vocabulary of
256,000. Only the logits of one chunk are in memory at a time. A gradient recomputes them.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_gemma.config import GemmaConfig
from keras_gemma.losses import LARGEST_CHUNK, cross_entropy
from keras_gemma.model.head import to_logits


def chunk_size(rows: int, vocabulary_size: int) -> int:
    """Returns the number of positions in a chunk, a power of two to limit compilations."""
    largest = 1 << max(0, (LARGEST_CHUNK // vocabulary_size).bit_length() - 1)
    return min(largest, 1 << (rows - 1).bit_length())


def chunk_losses(x: Any, target_ids: Any, head: Any, config: GemmaConfig) -> Any:
    """Returns the losses of one chunk, float32 `[R]`.

    Args:
        x: Output of the final norm, `[R, D]`.
        target_ids: int32 `[R]`.
        head: Packed embedding. It is a constant: no gradient is computed for it.
        config: Config of the model.
    """

    def losses(x: Any) -> Any:
        return cross_entropy(to_logits(x, head, config.final_logit_soft_cap), target_ids)

    return keras.remat(losses)(x)


def losses_in_chunks(
    x: Any,
    target_ids: Any,
    head: Any,
    config: GemmaConfig,
    run: Callable[..., Any] | None = None,
) -> Any:
    """Returns losses, float32 `[B, T]`.

    Args:
        x: Output of the final norm, `[B, T, D]`.
        target_ids: int32 `[B, T]`.
        head: Packed embedding.
        config: Config of the model.
        run: Compiled `chunk_losses` without its `config` argument. `None` runs it eagerly.
    """
    run = run or (lambda *args: chunk_losses(*args, config))
    shape = tuple(target_ids.shape)
    x = ops.reshape(x, (-1, config.hidden_dim))
    target_ids = ops.reshape(target_ids, (-1,))
    rows = x.shape[0]
    size = chunk_size(rows, config.vocabulary_size)
    if rows % size:
        x = ops.pad(x, ((0, -rows % size), (0, 0)))
        target_ids = ops.pad(target_ids, ((0, -rows % size),))
    starts = range(0, rows, size)
    losses = [run(x[i : i + size], target_ids[i : i + size], head) for i in starts]
    return ops.reshape(ops.concatenate(losses)[:rows], shape)
