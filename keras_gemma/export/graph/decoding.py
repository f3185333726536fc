"""Decoding loop in a TensorFlow graph, with its KV cache and stop strings.

A step is the one in `generation/decode.py`. XLA compiles it again for a new batch size, and when
sequences outgrow their cache, which then doubles. Knows strings only as stop strings.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from keras_gemma import backend
from keras_gemma.export.graph.prefill import Model, capacity_for, last_hidden, prefill
from keras_gemma.export.graph.settings import Settings
from keras_gemma.export.graph.text import GraphText
from keras_gemma.export.serving_options import OFF
from keras_gemma.generation.decode import DecodeState, append_tokens, next_logits
from keras_gemma.generation.samplers import Sampler
from keras_gemma.generation.samplers.noise import HASH_FACTOR
from keras_gemma.generation.samplers.random import FILTERS
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


@dataclasses.dataclass(eq=False)
class Decoder:
    """Generates continuations of prompts."""

    model: Model
    stop_token_ids: np.ndarray
    """int32 `[8]`, stop token ids, padded with -1."""
    silent_ids: list[int]
    """Ids that are not part of the generated text."""
    vocabulary: GraphText
    """The vocabulary, which may be smaller than the model's."""
    sizes: list[int | None]
    """Batch sizes that have a separate graph, because small batches use other matrix products.
    `None` is the graph of all other sizes."""

    def __post_init__(self) -> None:
        self.step = backend.jit_part(self._step)

    def _step(self, weights: dict[str, Any], state: DecodeState) -> DecodeState:
        functions = self.model.decode_functions
        logits, state = next_logits(weights, state, self.model.config, functions)
        return append_tokens(state, logits, ServedSampler())

    def run(
        self, weights: dict[str, Any], prompts: tf.RaggedTensor, settings: Settings
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns text `[B, S]`, length `[B]`, and the bytes before a stop string, or -1, `[B]`."""
        config = self.model.config
        lengths = tf.cast(prompts.row_lengths(), tf.int32)
        capacity = capacity_for(tf.reduce_max(lengths) + 1, config)
        token_ids, text = prompts.to_tensor(), prompts.to_tensor(-1)
        free = capacity - tf.shape(token_ids)[1]
        hidden = tf.zeros((tf.shape(lengths)[0], config.hidden_dim), self.model.dtype)
        hidden, cache = prefill(
            weights, token_ids, self.model, capacity, hidden, last_hidden(lengths)
        )
        state = DecodeState(
            text=tf.pad(text, [(0, 0), (0, free)], constant_values=-1),
            length=lengths,
            end=tf.minimum(lengths + settings.max_new_tokens, config.context_length),
            stop_token_ids=tf.constant(self.stop_token_ids),
            done=tf.zeros_like(lengths, tf.bool),
            cache=cache,
            sampler=sampler_state(settings, text),
        )
        branches = [
            functools.partial(self._loop, size, weights, hidden, state, settings.stop)
            for size in self.sizes
        ]
        if len(branches) == 1:
            return branches[0]()
        batch = tf.shape(lengths)[0]
        branch = tf.reduce_sum(tf.cast(batch > self.sizes[:-1], tf.int32))
        return tf.switch_case(branch, branches)

    def _loop(
        self,
        size: int | None,
        weights: dict[str, Any],
        hidden: tf.Tensor,
        state: DecodeState,
        stops: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Runs the loop for batches of `size`, from the output `hidden [B, D]` of the prompts."""

        def with_size(array: tf.Tensor) -> tf.Tensor:
            array = tf.identity(array)
            array.set_shape([size, *array.shape[1:]])
            return array

        hidden = with_size(hidden)
        sized = tf.nest.map_structure(with_size, changing(state) | {"end": state.end})
        state = state._replace(**sized)
        prompts = state.length
        logits = self.model.decode_functions.head(hidden, weights["head"], self.model.config)
        state = state._replace(cache=self._rings(state.cache, state.length))
        state = append_tokens(state, logits, ServedSampler())
        no_stop = tf.fill(tf.shape(prompts), -1)
        state, stop_offset = self._find_stop_strings(state, no_stop, prompts, stops)

        def body(arrays: dict[str, Any], stop_offset: tf.Tensor) -> tuple[Any, tf.Tensor]:
            before = state._replace(**arrays)
            is_full = tf.reduce_max(before.length) >= tf.shape(before.text)[1]
            text, cache = tf.cond(
                is_full, lambda: self._grow(before), lambda: (before.text, before.cache)
            )
            after = self.step(weights, before._replace(text=text, cache=cache))
            after, stop_offset = self._find_stop_strings(after, stop_offset, prompts, stops)
            return changing(after), stop_offset

        def growing(array: tf.Tensor) -> tf.TensorShape:
            return tf.TensorShape([array.shape[0], None, *array.shape[2:]])

        first = changing(state)
        shapes = tf.nest.map_structure(lambda array: array.shape, first)
        shapes |= tf.nest.map_structure(growing, {"text": state.text, "cache": state.cache})
        last, stop_offset = tf.while_loop(
            lambda arrays, _: tf.logical_not(tf.reduce_all(arrays["done"])),
            body,
            (first, stop_offset),
            shape_invariants=(shapes, stop_offset.shape),
        )
        return last["text"], last["length"], stop_offset

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
        self, state: DecodeState, stop_offset: tf.Tensor, prompts: tf.Tensor, stops: tf.Tensor
    ) -> tuple[DecodeState, tf.Tensor]:
        """Ends the sequences whose text contains a stop string."""

        def find() -> tuple[tf.Tensor, tf.Tensor]:
            text = self.vocabulary.decode(self.text_ids(state.text, prompts, state.length))
            offsets = tf.map_fn(
                lambda stop: tf.strings.length(tf.strings.split(text, stop)[:, :1].flat_values),
                stops,
                fn_output_signature=tf.TensorSpec([None], tf.int32),
            )
            offset = tf.reduce_min(offsets, axis=0)
            is_new = tf.logical_and(offset < tf.strings.length(text), stop_offset < 0)
            return tf.logical_or(state.done, is_new), tf.where(is_new, offset, stop_offset)

        done, offset = tf.cond(tf.size(stops) > 0, find, lambda: (state.done, stop_offset))
        for array in (done, offset):
            array.set_shape(state.length.shape)
        return state._replace(done=done), offset

    def text_ids(self, text: tf.Tensor, start: tf.Tensor, end: tf.Tensor) -> tf.RaggedTensor:
        """Returns the ids of `text [B, S]` from `start [B]` to `end [B]` that are decoded.

        Excludes stop tokens, silent ids and ids that are not in the vocabulary.
        """
        index = tf.range(tf.shape(text)[1])[None]
        in_range = (index >= start[:, None]) & (index < end[:, None])
        silent = tf.concat([self.stop_token_ids, self.silent_ids], 0)
        is_text = (text < self.vocabulary.size) & tf.reduce_all(text[..., None] != silent, -1)
        return tf.ragged.boolean_mask(text, in_range & is_text)


def changing(state: DecodeState) -> dict[str, Any]:
    """Returns the tensors of `state` that change from token to token, by field."""
    names = ("text", "length", "done", "cache", "sampler")
    return {name: getattr(state, name) for name in names}


def sampler_state(settings: Settings, text: tf.Tensor) -> dict[str, tf.Tensor]:
    """Returns the initial state of the sampler for prompts `text [B, T]`, padded with -1.

    Counterpart of `Sampler.init` and `Request.row_keys`.
    """
    batch, length = tf.unstack(tf.shape(text))
    factors = tf.math.cumprod(tf.fill([length], np.uint32(HASH_FACTOR).view("int32")))
    hashes = tf.reduce_sum((text + 1) * factors, axis=1)
    is_equal = tf.cast(hashes[:, None] == hashes[None], tf.int32)
    index = tf.reduce_sum(tf.linalg.band_part(is_equal, -1, 0), axis=1) - 1
    random_seed = tf.random.uniform((), tf.int32.min, tf.int32.max, tf.int32)
    seed = tf.where(settings.seed == -1, random_seed, settings.seed)
    values = {name: getattr(settings, name) for name in ("temperature", *OFF)} | {"seed": seed}
    state = {name: tf.fill([batch], value) for name, value in values.items()}
    return state | {"rows": hashes + index, "step": tf.zeros_like(hashes)}
