"""Decoding loop in a TensorFlow graph, with its KV cache and stop strings.

A step is the one in `generation/decode.py`. XLA compiles it again for a new batch size, and when
sequences outgrow their cache, which then doubles. Knows strings only as stop strings.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from keras_gemma import backend
from keras_gemma.export.graph.prefill import Model, capacity_for, last_hidden, prefill
from keras_gemma.export.graph.settings import Settings
from keras_gemma.export.serving_options import OFF
from keras_gemma.generation.decode import DecodeState, append_tokens, next_logits
from keras_gemma.generation.samplers import Sampler
from keras_gemma.generation.samplers.filters import FILTERS
from keras_gemma.generation.samplers.sampler import draw, first_argmax, tempered
from keras_gemma.model.cache import Cache, fill_ring


class ServedSampler(Sampler):
    """Sampler with all filters, each of which a call may disable. Greedy at temperature 0.

    Its settings are the same for all sequences of a batch.
    """

    def rule(self) -> str:
        return "served"

    def choose(self, logits: tf.Tensor, state: dict[str, Any]) -> tf.Tensor:
        def sample() -> tf.Tensor:
            filtered = tempered(logits, state)
            for name, keep in FILTERS.items():
                filtered = _apply_if_on(name, keep, filtered, state)
            return draw(filtered, state)

        return tf.cond(state["temperature"][0] > 0, sample, lambda: first_argmax(logits))


def _apply_if_on(
    name: str, keep: Callable[..., Any], logits: tf.Tensor, state: dict[str, Any]
) -> tf.Tensor:
    value = state[name]
    return tf.cond(value[0] != OFF[name], lambda: keep(logits, value), lambda: logits)


class LoopState(NamedTuple):
    """Tensors that change from token to token."""

    text: tf.Tensor  # int32 [B, S], same as in DecodeState
    length: tf.Tensor  # int32 [B]
    done: tf.Tensor  # bool [B]
    step: tf.Tensor  # int32 [B], same as in the sampler's state
    stop_offset: tf.Tensor  # int32 [B]: bytes of the new text before a stop string, or -1
    cache: Cache

    def from_decode_state(self, state: DecodeState) -> "LoopState":
        """Returns this state with the values of `state`."""
        step = state.sampler["step"]
        return self._replace(
            text=state.text, length=state.length, done=state.done, step=step, cache=state.cache
        )

    def to_decode_state(self, state: DecodeState) -> DecodeState:
        """Returns `state` with the values of this state."""
        sampler = {**state.sampler, "step": self.step}
        return state._replace(
            text=self.text, length=self.length, done=self.done, sampler=sampler, cache=self.cache
        )

    def shape_invariants(self) -> "LoopState":
        """Returns the shapes in a loop in which texts and caches grow."""

        def growing(array: tf.Tensor) -> tf.TensorShape:
            return tf.TensorShape([array.shape[0], None, *array.shape[2:]])

        rows = self.length.shape
        cache = [tuple(map(growing, arrays)) for arrays in self.cache]
        return LoopState(growing(self.text), rows, rows, rows, rows, cache)


class Decoder:
    """Generates continuations of prompts.

    Args:
        model: Functions of the model.
        stop_token_ids: int32 `[8]`, stop token ids, padded with -1.
        silent_ids: Ids that are not part of the generated text.
        vocabulary_size: Size of the vocabulary, which may be smaller than the model's.
        decode: Function from ids `[B, (T)]` to strings `[B]`.
        sizes: Batch sizes with a graph of their own, because small batches use other matrix
            products. `None` is the graph of all other sizes.
    """

    def __init__(
        self,
        model: Model,
        stop_token_ids: Any,
        silent_ids: list[int],
        vocabulary_size: int,
        decode: Callable[[tf.RaggedTensor], tf.Tensor],
        sizes: list[int | None],
    ) -> None:
        self.model = model
        self.stop_token_ids = stop_token_ids
        self.silent_ids = silent_ids
        self.vocabulary_size = vocabulary_size
        self.decode = decode
        self.sizes = sizes
        self.step = backend.jit_part(self._step)

    def _step(self, weights: dict[str, Any], state: DecodeState) -> DecodeState:
        functions = self.model.decode_functions
        logits, state = next_logits(weights, state, self.model.config, functions)
        return append_tokens(state, logits, ServedSampler())

    def run(
        self, weights: dict[str, Any], prompts: tf.RaggedTensor, settings: Settings
    ) -> LoopState:
        """Returns the final state of the loop, without its cache."""
        config = self.model.config
        lengths = tf.cast(prompts.row_lengths(), tf.int32)
        capacity = capacity_for(tf.reduce_max(lengths) + 1, config)
        token_ids = prompts.to_tensor()
        free = capacity - tf.shape(token_ids)[1]
        hidden = tf.zeros((tf.shape(lengths)[0], config.hidden_dim), self.model.dtype)
        hidden, cache = prefill(
            weights, token_ids, self.model, capacity, hidden, last_hidden(lengths)
        )
        state = DecodeState(
            text=tf.pad(prompts.to_tensor(-1), [(0, 0), (0, free)], constant_values=-1),
            length=lengths,
            end=tf.minimum(lengths + settings.max_new_tokens, config.context_length),
            stop_token_ids=tf.constant(self.stop_token_ids),
            done=tf.zeros_like(lengths, tf.bool),
            cache=cache,
            sampler=sampler_state(settings, token_ids, lengths),
        )
        branches = [
            self._branch(size, weights, hidden, state, settings.stop) for size in self.sizes
        ]
        if len(branches) == 1:
            return branches[0]()
        batch = tf.shape(lengths)[0]
        branch = tf.reduce_sum(tf.cast(batch > self.sizes[:-1], tf.int32))
        return tf.switch_case(branch, branches)

    def _branch(
        self,
        size: int | None,
        weights: dict[str, Any],
        hidden: tf.Tensor,
        state: DecodeState,
        stops: tf.Tensor,
    ) -> Callable[[], LoopState]:
        """Returns the loop for batches of `size`, as a branch of `tf.switch_case`."""

        def with_size(array: tf.Tensor) -> tf.Tensor:
            array = tf.identity(array)
            array.set_shape([size, *array.shape[1:]])
            return array

        def branch() -> LoopState:
            sized = state._replace(
                text=with_size(state.text),
                length=with_size(state.length),
                end=with_size(state.end),
                done=with_size(state.done),
                cache=[tuple(map(with_size, arrays)) for arrays in state.cache],
                sampler={name: with_size(value) for name, value in state.sampler.items()},
            )
            return self._loop(weights, with_size(hidden), sized, stops)._replace(cache=[])

        return branch

    def _loop(
        self, weights: dict[str, Any], hidden: tf.Tensor, state: DecodeState, stops: tf.Tensor
    ) -> LoopState:
        prompts = state.length
        logits = self.model.decode_functions.head(hidden, weights["head"], self.model.config)
        state = state._replace(cache=self._rings(state.cache, state.length))
        state = append_tokens(state, logits, ServedSampler())
        no_stop = tf.fill(tf.shape(prompts), -1)
        first = LoopState(state.text, state.length, state.done, prompts, no_stop, [])
        first = self._find_stop_strings(first.from_decode_state(state), prompts, stops)

        def body(*values: Any) -> LoopState:
            before = LoopState(*values).to_decode_state(state)
            is_full = tf.reduce_max(before.length) >= tf.shape(before.text)[1]
            text, cache = tf.cond(
                is_full, lambda: self._grow(before), lambda: (before.text, before.cache)
            )
            after = self.step(weights, before._replace(text=text, cache=cache))
            return self._find_stop_strings(
                LoopState(*values).from_decode_state(after), prompts, stops
            )

        def any_unfinished(*values: Any) -> tf.Tensor:
            return tf.logical_not(tf.reduce_all(LoopState(*values).done))

        last = tf.while_loop(any_unfinished, body, first, shape_invariants=first.shape_invariants())
        return LoopState(*last)

    def _rings(self, cache: Cache, lengths: tf.Tensor) -> Cache:
        """Returns a prompt's cache in the form for decoding; counterpart of `prefill.to_rings`."""

        def ring(array: tf.Tensor, window: int | None) -> tf.Tensor:
            if window is None:
                return array
            is_longer = tf.shape(array)[1] > window
            return tf.cond(is_longer, lambda: fill_ring(array, window, lengths), lambda: array)

        return self._map_by_window(ring, cache)

    def _grow(self, state: DecodeState) -> tuple[tf.Tensor, Cache]:
        """Returns text and cache with twice the capacity."""
        capacity = tf.shape(state.text)[1]

        def grow(array: tf.Tensor, window: int | None) -> tf.Tensor:
            slots = 2 * capacity if window is None else tf.minimum(2 * capacity, window)
            return tf.pad(array, [(0, 0), (0, slots - tf.shape(array)[1]), (0, 0), (0, 0)])

        text = tf.pad(state.text, [(0, 0), (0, capacity)], constant_values=-1)
        return text, self._map_by_window(grow, state.cache)

    def _map_by_window(
        self, function: Callable[[tf.Tensor, int | None], tf.Tensor], cache: Cache
    ) -> Cache:
        """Applies `function` to each array of `cache` and the window of its layer."""
        windows = [self.model.config.layer_kind(i).window for i in range(len(cache))]
        return [
            tuple(function(array, window) for array in arrays)
            for window, arrays in zip(windows, cache, strict=True)
        ]

    def _find_stop_strings(
        self, state: LoopState, prompts: tf.Tensor, stops: tf.Tensor
    ) -> LoopState:
        """Ends the sequences whose text contains a stop string."""

        def find() -> tuple[tf.Tensor, tf.Tensor]:
            text = self.decode(self.text_ids(state.text, prompts, state.length))
            offsets = tf.map_fn(
                lambda stop: tf.strings.length(tf.strings.split(text, stop)[:, :1].flat_values),
                stops,
                fn_output_signature=tf.TensorSpec([None], tf.int32),
            )
            offset = tf.reduce_min(offsets, axis=0)
            is_new = tf.logical_and(offset < tf.strings.length(text), state.stop_offset < 0)
            stop_offset = tf.where(is_new, offset, state.stop_offset)
            return stop_offset, tf.logical_or(state.done, is_new)

        stop_offset, done = tf.cond(
            tf.size(stops) > 0, find, lambda: (state.stop_offset, state.done)
        )
        for array in (stop_offset, done):
            array.set_shape(state.length.shape)
        return state._replace(stop_offset=stop_offset, done=done)

    def text_ids(self, text: tf.Tensor, start: tf.Tensor, end: tf.Tensor) -> tf.RaggedTensor:
        """Returns the ids of `text [B, S]` from `start [B]` to `end [B]` that are decoded.

        Excludes stop tokens, silent ids and ids that are not in the vocabulary.
        """
        index = tf.range(tf.shape(text)[1])[None]
        in_range = (index >= start[:, None]) & (index < end[:, None])
        silent = tf.concat([self.stop_token_ids, self.silent_ids], 0)
        is_text = (text < self.vocabulary_size) & tf.reduce_all(text[..., None] != silent, -1)
        return tf.ragged.boolean_mask(text, in_range & is_text)


def sampler_state(
    settings: Settings, token_ids: tf.Tensor, lengths: tf.Tensor
) -> dict[str, tf.Tensor]:
    """Returns the initial state of the sampler; counterpart of `Sampler.init`.

    Sequences with equal prompts, `token_ids [B, T]`, differ in the number of equal ones before
    them.
    """
    batch = tf.shape(lengths)[0]
    is_equal = tf.reduce_all(token_ids[:, None] == token_ids[None], axis=-1)
    is_equal = tf.logical_and(is_equal, lengths[:, None] == lengths[None])
    equal_before = tf.linalg.band_part(tf.cast(is_equal, tf.int32), -1, 0)
    random_seed = tf.random.uniform((), tf.int32.min, tf.int32.max, tf.int32)
    seed = tf.where(settings.seed == -1, random_seed, settings.seed)
    values = {name: getattr(settings, name) for name in ("temperature", *OFF)}
    state = {name: tf.fill([batch], value) for name, value in (values | {"seed": seed}).items()}
    rows = tf.reduce_sum(equal_before, axis=1) - 1
    return state | {"rows": rows, "step": tf.zeros_like(lengths)}
