"""Token after token, in a TensorFlow graph: the whole loop, with its cache, and stop strings.

A step is `generation/decode.py`'s, compiled by XLA when a batch of a new size comes and when texts
outgrow their cache, which then doubles. Knows strings only as what ends a text.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from keras_gemma import backend
from keras_gemma.export.graph.prefill import Model, capacity_for, last_of_each, read
from keras_gemma.export.serving_options import OFF
from keras_gemma.generation.decode import DecodeState, append_tokens, step
from keras_gemma.generation.samplers import Sampler
from keras_gemma.generation.samplers.filters import FILTERS
from keras_gemma.generation.samplers.sampler import draw, first_argmax, tempered
from keras_gemma.model.cache import Cache, fill_ring


class ServedSampler(Sampler):
    """Greedy at temperature 0; else it draws from what those filters leave that are on.

    Its settings are the same in all rows of a batch.
    """

    def rule(self) -> str:
        return "served"

    def choose(self, logits: tf.Tensor, state: dict[str, Any]) -> tf.Tensor:
        def drawn() -> tf.Tensor:
            wanted = tempered(logits, state)
            for name, keep in FILTERS.items():
                wanted = _where_on(name, keep, wanted, state)
            return draw(wanted, state)

        return tf.cond(state["temperature"][0] > 0, drawn, lambda: first_argmax(logits))


def _where_on(
    name: str, keep: Callable[..., Any], logits: tf.Tensor, state: dict[str, Any]
) -> tf.Tensor:
    value = state[name]
    return tf.cond(value[0] != OFF[name], lambda: keep(logits, value), lambda: logits)


class Settings(NamedTuple):
    """How to continue, the same for all rows; all are scalars but the last."""

    max_new_tokens: tf.Tensor
    temperature: tf.Tensor
    top_k: tf.Tensor
    top_p: tf.Tensor
    min_p: tf.Tensor
    seed: tf.Tensor
    """-1 draws another one each time."""
    stop: tf.Tensor
    """Strings `[N]`."""


class Progress(NamedTuple):
    """What changes from token to token."""

    text: tf.Tensor  # int32 [B, S], as of DecodeState
    length: tf.Tensor  # int32 [B]
    done: tf.Tensor  # bool [B]
    step: tf.Tensor  # int32 [B], the sampler's
    kept: tf.Tensor  # int32 [B]: bytes of the new text before the stop string, or -1
    cache: Cache

    def of(self, state: DecodeState) -> "Progress":
        """With all that `state` says."""
        step = state.sampler["step"]
        return self._replace(
            text=state.text, length=state.length, done=state.done, step=step, cache=state.cache
        )

    def over(self, state: DecodeState) -> DecodeState:
        """`state` with all that this says."""
        sampler = {**state.sampler, "step": self.step}
        return state._replace(
            text=self.text, length=self.length, done=self.done, sampler=sampler, cache=self.cache
        )

    def shapes(self) -> "Progress":
        """Those of a loop in which texts and caches grow."""

        def longer(array: tf.Tensor) -> tf.TensorShape:
            return tf.TensorShape([array.shape[0], None, *array.shape[2:]])

        rows = self.length.shape
        cache = [tuple(longer(array) for array in kept) for kept in self.cache]
        return Progress(longer(self.text), rows, rows, rows, rows, cache)


class Decoder:
    """Continues prompts.

    Args:
        model: the model.
        stop_token_ids: int32 `[8]`, ids that end a row, -1 where there are fewer.
        silent_ids: ids that are not written.
        vocabulary_size: of the vocabulary, which may be smaller than the model's.
        decode: ids `[B, (T)]` to strings `[B]`.
        sizes: batches that have a graph of their own, for fewer rows are multiplied otherwise;
            None is that of all other sizes.
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
        return step(weights, state, self.model.config, ServedSampler(), (), self.model.fused)

    def run(
        self, weights: dict[str, Any], prompts: tf.RaggedTensor, settings: Settings
    ) -> Progress:
        """The end of the loop, without its cache."""
        config = self.model.config
        lengths = tf.cast(prompts.row_lengths(), tf.int32)
        capacity = capacity_for(tf.reduce_max(lengths) + 1, config)
        token_ids = prompts.to_tensor()
        free = capacity - tf.shape(token_ids)[1]
        hidden = tf.zeros((tf.shape(lengths)[0], config.hidden_dim), self.model.dtype)
        hidden, cache = read(
            weights, token_ids, self.model, capacity, hidden, last_of_each(lengths)
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
        branches = [self._rows(size, weights, hidden, state, settings.stop) for size in self.sizes]
        if len(branches) == 1:
            return branches[0]()
        batch = tf.shape(lengths)[0]
        branch = tf.reduce_sum(tf.cast(batch > self.sizes[:-1], tf.int32))
        return tf.switch_case(branch, branches)

    def _rows(
        self,
        size: int | None,
        weights: dict[str, Any],
        hidden: tf.Tensor,
        state: DecodeState,
        stops: tf.Tensor,
    ) -> Callable[[], Progress]:
        """The loop of a batch of `size`."""

        def known(array: tf.Tensor) -> tf.Tensor:
            array = tf.identity(array)
            array.set_shape([size, *array.shape[1:]])
            return array

        def go() -> Progress:
            rows = state._replace(
                text=known(state.text),
                length=known(state.length),
                end=known(state.end),
                done=known(state.done),
                cache=[tuple(map(known, kept)) for kept in state.cache],
                sampler={name: known(value) for name, value in state.sampler.items()},
            )
            return self._loop(weights, known(hidden), rows, stops)._replace(cache=[])

        return go

    def _loop(
        self, weights: dict[str, Any], hidden: tf.Tensor, state: DecodeState, stops: tf.Tensor
    ) -> Progress:
        prompts = state.length
        logits = self.model.fused.head(hidden, weights["head"], self.model.config)
        state = state._replace(cache=self._rings(state.cache, state.length))
        state = append_tokens(state, logits, ServedSampler())
        nothing = tf.fill(tf.shape(prompts), -1)
        first = Progress(state.text, state.length, state.done, prompts, nothing, [])
        first = self._stop(first.of(state), prompts, stops)

        def turn(*progress: Any) -> Progress:
            before = Progress(*progress).over(state)
            full = tf.reduce_max(before.length) >= tf.shape(before.text)[1]
            text, cache = tf.cond(
                full, lambda: self._grow(before), lambda: (before.text, before.cache)
            )
            after = self.step(weights, before._replace(text=text, cache=cache))
            return self._stop(Progress(*progress).of(after), prompts, stops)

        def growing(*progress: Any) -> tf.Tensor:
            return tf.logical_not(tf.reduce_all(Progress(*progress).done))

        last = tf.while_loop(growing, turn, first, shape_invariants=first.shapes())
        return Progress(*last)

    def _rings(self, cache: Cache, lengths: tf.Tensor) -> Cache:
        """The cache of a prompt as decoding keeps it: `prefill.to_rings`."""

        def ring(array: tf.Tensor, window: int | None) -> tf.Tensor:
            if window is None:
                return array
            longer = tf.shape(array)[1] > window
            return tf.cond(longer, lambda: fill_ring(array, window, lengths), lambda: array)

        windows = [self.model.config.layer_kind(i).window for i in range(len(cache))]
        return [
            tuple(ring(array, window) for array in kept)
            for window, kept in zip(windows, cache, strict=True)
        ]

    def _grow(self, state: DecodeState) -> tuple[tf.Tensor, Cache]:
        """Text and cache with room for twice as many tokens."""
        held = tf.shape(state.text)[1]

        def grow(array: tf.Tensor, window: int | None) -> tf.Tensor:
            slots = 2 * held if window is None else tf.minimum(2 * held, window)
            after = slots - tf.shape(array)[1]
            return tf.pad(array, [(0, 0), (0, after), (0, 0), (0, 0)])

        windows = [self.model.config.layer_kind(i).window for i in range(len(state.cache))]
        cache = [
            tuple(grow(array, window) for array in kept)
            for window, kept in zip(windows, state.cache, strict=True)
        ]
        return tf.pad(state.text, [(0, 0), (0, held)], constant_values=-1), cache

    def _stop(self, progress: Progress, prompts: tf.Tensor, stops: tf.Tensor) -> Progress:
        """End those rows whose text has come to a stop string."""

        def look() -> tuple[tf.Tensor, tf.Tensor]:
            text = self.decode(self.written(progress.text, prompts, progress.length))
            before = tf.map_fn(
                lambda stop: tf.strings.length(tf.strings.split(text, stop)[:, :1].flat_values),
                stops,
                fn_output_signature=tf.TensorSpec([None], tf.int32),
            )
            before = tf.reduce_min(before, axis=0)
            found = tf.logical_and(before < tf.strings.length(text), progress.kept < 0)
            return tf.where(found, before, progress.kept), tf.logical_or(progress.done, found)

        kept, done = tf.cond(tf.size(stops) > 0, look, lambda: (progress.kept, progress.done))
        for array in (kept, done):
            array.set_shape(progress.length.shape)
        return progress._replace(kept=kept, done=done)

    def written(self, text: tf.Tensor, start: tf.Tensor, end: tf.Tensor) -> tf.RaggedTensor:
        """The ids of `text [B, S]` from `start [B]` to `end [B]` that are written.

        Not those that the model has and the vocabulary has not.
        """
        place = tf.range(tf.shape(text)[1])[None]
        here = (place >= start[:, None]) & (place < end[:, None]) & (text < self.vocabulary_size)
        silent = tf.concat([self.stop_token_ids, self.silent_ids], 0)
        return tf.ragged.boolean_mask(text, here & tf.reduce_all(text[..., None] != silent, -1))


def sampler_state(
    settings: Settings, token_ids: tf.Tensor, lengths: tf.Tensor
) -> dict[str, tf.Tensor]:
    """The state of the sampler before its first choice: see `Sampler.init`.

    Rows of equal prompts, `token_ids [B, T]`, are told apart by how many of them stand before.
    """
    batch = tf.shape(lengths)[0]
    same = tf.reduce_all(token_ids[:, None] == token_ids[None], axis=-1)
    same = tf.logical_and(same, lengths[:, None] == lengths[None])
    before = tf.linalg.band_part(tf.cast(same, tf.int32), -1, 0)
    another = tf.random.uniform((), tf.int32.min, tf.int32.max, tf.int32)
    seed = tf.where(settings.seed == -1, another, settings.seed)
    values = {name: getattr(settings, name) for name in ("temperature", *OFF)}
    state = {name: tf.fill([batch], value) for name, value in (values | {"seed": seed}).items()}
    return state | {"rows": tf.reduce_sum(before, axis=1) - 1, "step": tf.zeros_like(lengths)}
