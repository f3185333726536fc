"""Model in a SavedModel: its weights once, and functions from strings to strings.

Inputs are checked in the graph: an invalid value raises an `InvalidArgumentError` that names it.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from keras_gemma.export.graph.chat import ChatTemplate
from keras_gemma.export.graph.decoding import Decoder
from keras_gemma.export.graph.prefill import model_of
from keras_gemma.export.graph.scoring import score
from keras_gemma.export.graph.settings import Settings, check, check_settings, checked
from keras_gemma.export.graph.text import GraphText, rstrip
from keras_gemma.export.serving_options import OFF, ServingOptions
from keras_gemma.generation.stopping import is_stop_token, stop_array
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor

TEXTS = tf.TensorSpec([None], tf.string)
TEXT_GRID = tf.TensorSpec([None, None], tf.string)

INPUTS = {
    "prompts": TEXTS,
    "texts": TEXTS,
    "continuations": TEXTS,
    "roles": TEXT_GRID,
    "contents": TEXT_GRID,
    "token_ids": tf.TensorSpec([None, None], tf.int32),
    "max_new_tokens": tf.TensorSpec([], tf.int32),
    "temperature": tf.TensorSpec([], tf.float32),
    **{
        name: tf.TensorSpec([], tf.int32 if isinstance(value, int) else tf.float32)
        for name, value in OFF.items()
    },
    "seed": tf.TensorSpec([], tf.int32),
    "stop": TEXTS,
}
"""Inputs of all functions, by name."""

MAX_SMALL_BATCH = {None: 1, "int8": 1, "int4": 4, "as_stored": 4}
"""Maximum batch size with a special matrix product (`backend/`), by mode of quantization."""


class ServedModel(tf.Module):
    """Variables and vocabulary of the SavedModel; `add_functions` adds its functions.

    Variables of the backbone are used without a copy unless they are cast.
    """

    def __init__(self, backbone: GemmaBackbone, preprocessor: GemmaCausalLMPreprocessor) -> None:
        super().__init__()

        def variable(leaf: Any) -> tf.Variable | None:
            return leaf if leaf is None or isinstance(leaf, tf.Variable) else tf.Variable(leaf)

        weights = tf.nest.map_structure(variable, backbone.tensors())
        self.weights = [leaf for leaf in tf.nest.flatten(weights) if leaf is not None]
        self.read_weights = lambda: tf.nest.map_structure(
            lambda leaf: None if leaf is None else tf.convert_to_tensor(leaf), weights
        )
        self.text = GraphText(preprocessor.tokenizer.pieces)


class ServingFunctions:
    """Computations of the functions, on tensors, with weights and vocabulary of `served`."""

    def __init__(self, served: ServedModel, lm: Any, options: ServingOptions) -> None:
        self.weights, self.text = served.read_weights, served.text
        self.config, self.options = lm.backbone.config, options
        self.tokenizer = lm.preprocessor.tokenizer
        self.add_start_token = lm.preprocessor.add_start_token
        self.model = model_of(self.config, lm.backbone.compute_dtype)
        quantization = lm.backbone.quantization
        small = MAX_SMALL_BATCH[quantization and quantization.mode]
        limit = options.max_batch_size
        sizes: list[int | None] = [size for size in range(1, small + 1) if size <= (limit or size)]
        if limit is None or limit > small:
            sizes.append(None)
        self.decoder = Decoder(
            self.model,
            stop_array(options.stop_token_ids),
            self.tokenizer.special_token_ids,
            self.text,
            sizes,
        )

    def prompt_ids(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Returns the ids `[B, (T)]` of strings `[B]`, with one start token if the model has it."""
        ids = self.text.encode(texts)
        if not self.add_start_token:
            return ids
        start = self.tokenizer.start_token_id
        has_start = tf.reduce_any(ids[:, :1] == start, axis=1)
        return tf.concat([_column(start, ~has_start), ids], axis=1)

    def complete(self, prompts: tf.RaggedTensor, settings: Settings) -> dict[str, tf.Tensor]:
        """Returns the continuations of prompts, ids `[B, (T)]`."""
        start = tf.cast(prompts.row_lengths(), tf.int32)
        context = self.config.context_length
        checks = [
            *check_settings(settings),
            *self._check_batch(tf.shape(start)[0]),
            check(
                start < context,
                f"A prompt must be shorter than the context length of {context} tokens: "
                "shorten it. Received, tokens:",
                start,
            ),
            check(start > 0, "A prompt has no tokens. Received, tokens:", start),
        ]
        prompts = checked(prompts, checks)
        text, end, stop_offset = self.decoder.run(self.weights(), prompts, settings)
        new_text = self.text.decode(self.decoder.text_ids(text, start, end))
        full_text = self.text.decode(self.decoder.text_ids(text, tf.zeros_like(start), end))
        has_stop_string = stop_offset >= 0
        cut = tf.where(has_stop_string, tf.strings.length(new_text) - stop_offset, 0)
        last = tf.gather(text, end - 1, axis=1, batch_dims=1)
        stopped = is_stop_token(last, self.decoder.stop_token_ids) | has_stop_string
        index = tf.range(tf.shape(text)[1])[None]
        is_new = (index >= start[:, None]) & (index < end[:, None])
        pad = self.tokenizer.pad_token_id
        return {
            "text": _without_end(full_text, cut),
            "new_text": _without_end(new_text, cut),
            "token_ids": tf.ragged.boolean_mask(text, is_new).to_tensor(pad),
            "lengths": end - start,
            "finish_reason": tf.where(stopped, "stop", "length"),
        }

    def score(self, texts: tf.Tensor, continuations: tf.Tensor) -> dict[str, tf.Tensor]:
        """Returns the scores of strings `[B]`, or of their continuations `[B]` if there are any."""
        batch, count = tf.shape(texts)[0], tf.shape(continuations)[0]
        has_right_count = check(
            (count == 0) | (count == batch),
            "`continuations` must be empty or have one string for each text. Received:",
            count,
        )
        endings = tf.cond(count > 0, lambda: continuations, lambda: tf.fill([batch], ""))
        texts = checked(texts, [has_right_count, *self._check_batch(batch)])
        ids = self.prompt_ids(tf.strings.join([texts, endings]))
        text_lengths = tf.cast(self.prompt_ids(rstrip(texts)).row_lengths(), tf.int32)
        start = tf.where(count > 0, tf.maximum(text_lengths, 1), 1)
        context, lengths = self.config.context_length, ids.row_lengths()
        fits = check(
            lengths <= context,
            f"A text must fit into the context length of {context} tokens. Received, tokens:",
            lengths,
        )
        return score(self.weights(), checked(ids, [fits]), start, self.model)

    def tokenize(self, texts: tf.Tensor) -> dict[str, tf.Tensor]:
        """Returns the ids of strings `[B]`, as `GemmaTokenizer` does."""
        ids, tokenizer = self.text.encode(texts), self.tokenizer
        every_row = tf.ones_like(ids.row_lengths(), tf.bool)
        if tokenizer.add_bos:
            ids = tf.concat([_column(tokenizer.start_token_id, every_row), ids], axis=1)
        if tokenizer.add_eos:
            ids = tf.concat([ids, _column(tokenizer.end_token_id, every_row)], axis=1)
        if tokenizer.sequence_length is not None:
            ids = ids[:, : tokenizer.sequence_length]
        shape = [None, tokenizer.sequence_length]
        return {
            "token_ids": ids.to_tensor(tokenizer.pad_token_id, shape=shape),
            "lengths": tf.cast(ids.row_lengths(), tf.int32),
        }

    def detokenize(self, token_ids: tf.Tensor) -> dict[str, tf.Tensor]:
        """Returns the texts of ids `[B, T]`, without padding."""
        size = self.text.size
        in_vocabulary = check(
            (token_ids >= 0) & (token_ids < size),
            f"`token_ids` must be in the vocabulary's range [0, {size}). Received:",
            token_ids,
        )
        ids = tf.RaggedTensor.from_tensor(checked(token_ids, [in_vocabulary]))
        return {"text": self.text.decode(ids)}

    def _check_batch(self, batch: tf.Tensor) -> list[tf.Operation]:
        limit = self.options.max_batch_size
        checks = [check(batch > 0, "A call needs at least one text. Received, texts:", batch)]
        if limit is not None:
            message = f"A call takes at most {limit} texts (`max_batch_size`). Received, texts:"
            checks.append(check(batch <= limit, message, batch))
        return checks


def add_functions(
    served: ServedModel, functions: ServingFunctions, report: Callable[[str], None]
) -> dict[str, Any]:
    """Adds the functions to `served` as attributes, and returns them by name.

    Settings have defaults when the functions are called from Python, and in the signatures for
    runtimes that use those defaults, such as TensorFlow Serving.
    """
    values = {name: getattr(functions.options, name) for name in Settings._fields}
    values["stop"] = np.array(values["stop"], object)  # strings, also if there are none
    values["continuations"] = np.array([], object)
    defaults = {name: tf.constant(value, INPUTS[name].dtype) for name, value in values.items()}

    def tf_function(python: Callable[..., Any], *names: str) -> Any:
        def traced(*inputs: tf.Tensor) -> Any:
            report(f"Tracing {python.__name__}")
            return python(*inputs)

        traced.__name__ = python.__name__
        kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
        traced.__signature__ = inspect.Signature(
            [inspect.Parameter(name, kind, default=defaults.get(name, empty)) for name in names]
        )
        specs = [INPUTS[name] for name in names]
        return tf.function(traced, input_signature=specs, autograph=False)

    def generate(prompts: tf.Tensor, *settings: tf.Tensor) -> dict[str, tf.Tensor]:
        return functions.complete(functions.prompt_ids(prompts), Settings(*settings))

    by_name = {
        "generate": tf_function(generate, "prompts", *Settings._fields),
        "score": tf_function(functions.score, "texts", "continuations"),
        "tokenize": tf_function(functions.tokenize, "texts"),
        "detokenize": tf_function(functions.detokenize, "token_ids"),
    }
    if functions.tokenizer.end_of_turn_token_id is not None:
        template = ChatTemplate(functions.text, functions.tokenizer)

        def chat(
            roles: tf.Tensor, contents: tf.Tensor, *settings: tf.Tensor
        ) -> dict[str, tf.Tensor]:
            result = functions.complete(template.render(roles, contents), Settings(*settings))
            reply = result.pop("new_text")
            return {**result, "reply": reply}

        by_name["chat"] = tf_function(chat, "roles", "contents", *Settings._fields)
    for name, function in by_name.items():
        setattr(served, name, function)
    return {"serving_default": by_name["generate"], **by_name}


def _column(id: int, rows: tf.Tensor) -> tf.RaggedTensor:
    """Returns a column with `id` in the rows that are True in `rows [B]`, and empty in others."""
    return tf.ragged.boolean_mask(tf.fill([tf.shape(rows)[0], 1], id), rows[:, None])


def _without_end(texts: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """Returns strings `[B]` without their last `size [B]` bytes."""
    return tf.strings.substr(texts, tf.zeros_like(size), tf.strings.length(texts) - size)
