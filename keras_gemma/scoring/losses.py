"""Cross entropy of given ids, a chunk of positions at a time.

The logits of a long text are its largest array by far: 4 GB for 4,096 tokens of a vocabulary of
256,000. Here those of a chunk are the most that there are, in a gradient too, where they are
computed anew.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_gemma.config import GemmaConfig
from keras_gemma.losses import LARGEST_CHUNK, cross_entropy
from keras_gemma.model.head import to_logits


def chunk_size(rows: int, vocabulary_size: int) -> int:
    """The positions of a chunk: a power of two, so that few shapes are compiled."""
    most = 1 << max(0, (LARGEST_CHUNK // vocabulary_size).bit_length() - 1)
    return min(most, 1 << (rows - 1).bit_length())


def chunk_losses(x: Any, target_ids: Any, head: Any, config: GemmaConfig) -> Any:
    """The losses of one chunk: `x [R, D]`, normalised, and ids `[R]` -> float32 `[R]`.

    Args:
        head: the packed embedding, a constant: no gradient is computed for it.
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
    """Losses, float32 `[B, T]`, of `x [B, T, D]`, normalised, and ids `[B, T]`.

    Args:
        head: the packed embedding.
        run: a program of `chunk_losses` without its `config`; None to run it as it is.
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
