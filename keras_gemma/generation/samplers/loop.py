"""KerasHub's way to call a sampler: decoding with a function that returns logits.

    prompt = sampler(next=next, prompt=prompt, cache=cache, index=5)

`generate` does not use these loops, which know neither models nor ring buffers. Decoding loops of
users do, with a cache of any structure.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

Next = Callable[[Any, Any, Any], tuple[Any, Any, Any]]
"""`(prompt [B, T], cache, index) -> (logits [B, V], hidden states [B, D], cache)`, where the logits
are those of the token at `index`."""


class Prompt:
    """Rules for the tokens `[B, T]` of a loop: which are kept, and when a row is finished."""

    def __init__(self, tokens: Any, mask: Any, stop_token_ids: Sequence[int] | None) -> None:
        self.mask = ops.zeros_like(tokens, "bool") if mask is None else ops.cast(mask, "bool")
        self.stop_token_ids = stop_token_ids

    def repeat(self, count: int) -> "Prompt":
        """Returns the rules of `count` rows in place of each."""
        return Prompt(self.mask, ops.repeat(self.mask, count, axis=0), self.stop_token_ids)

    def is_new_stop(self, tokens: Any) -> Any:
        """Returns True at stop tokens that are not kept: bool `[B, T]`."""
        if self.stop_token_ids is None:
            return ops.zeros_like(self.mask)
        stops = ops.convert_to_tensor(list(self.stop_token_ids), dtype="int32")
        is_stop = ops.any(ops.cast(tokens, "int32")[:, :, None] == stops, axis=-1)
        return ops.logical_and(is_stop, ops.logical_not(self.mask))

    def is_finished(self, tokens: Any) -> Any:
        """Returns True for rows with a new stop token: bool `[B]`."""
        return ops.any(self.is_new_stop(tokens), axis=-1)

    def is_fixed(self, tokens: Any, index: Any) -> Any:
        """Returns True for rows that keep their token at `index`: bool `[B]`."""
        return ops.logical_or(take_column(self.mask, index), self.is_finished(tokens))

    def write(self, tokens: Any, index: Any, ids: Any) -> Any:
        """Returns `tokens` with `ids [B]` at `index`, except in rows that keep theirs."""
        current = take_column(tokens, index)
        ids = ops.where(self.is_fixed(tokens, index), current, ops.cast(ids, tokens.dtype))
        return ops.slice_update(tokens, [0, index], ids[:, None])

    def loop(self, body: Callable[..., Any], index: Any, tokens: Any, *state: Any) -> Any:
        """Calls `body(index, tokens, *state) -> (tokens, *state)` for each index. Stops early if
        all rows are finished."""
        index = ops.cast(index, "int32")
        return ops.while_loop(
            lambda index, tokens, *_: ops.logical_not(ops.all(self.is_finished(tokens))),
            lambda index, *rest: (index + 1, *body(index, *rest)),
            (index, tokens, *state),
            maximum_iterations=ops.cast(tokens.shape[1], "int32") - index,
        )[1:]


def take_column(array: Any, index: Any) -> Any:
    """Returns `array[:, index]`."""
    return ops.take(array, index, axis=1)


def take_rows(cache: Any, rows: Any) -> Any:
    """Returns a cache with `rows [R]` of its arrays `[B, ...]`."""
    return keras.tree.map_structure(lambda array: ops.take(array, rows, axis=0), cache)


def repeat_numbers(rows: int, count: int) -> Any:
    """Returns the numbers of `rows`, each `count` times: int32 `[rows * count]`."""
    return ops.repeat(ops.arange(rows, dtype="int32"), count)
