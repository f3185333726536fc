"""The model that a SavedModel holds: its weights once, and functions from strings to strings.

What a caller gives is checked in the graph: a wrong value is an `InvalidArgumentError` that says
which.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from keras_gemma.export.graph.chat import ChatTemplate
from keras_gemma.export.graph.checks import check, check_settings
from keras_gemma.export.graph.decoding import Decoder, Settings
from keras_gemma.export.graph.prefill import model_of
from keras_gemma.export.graph.scoring import score
from keras_gemma.export.graph.text import GraphText, rstrip
from keras_gemma.export.serving_options import ServingOptions
from keras_gemma.generation.stopping import is_stop_token, stop_array
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor

TEXTS = tf.TensorSpec([None], tf.string)
GRID = tf.TensorSpec([None, None], tf.string)

INPUTS = {
    "prompts": TEXTS,
    "texts": TEXTS,
    "continuations": TEXTS,
    "roles": GRID,
    "contents": GRID,
    "token_ids": tf.TensorSpec([None, None], tf.int32),
    "max_new_tokens": tf.TensorSpec([], tf.int32),
    "temperature": tf.TensorSpec([], tf.float32),
    "top_k": tf.TensorSpec([], tf.int32),
    "top_p": tf.TensorSpec([], tf.float32),
    "min_p": tf.TensorSpec([], tf.float32),
    "seed": tf.TensorSpec([], tf.int32),
    "stop": TEXTS,
}
"""All inputs of the functions, by their names."""

SMALL_BATCHES = {16: 1, 8: 1, 4: 4}
"""By bits: up to so many rows a product is another one than that of more (`backend/`)."""


class ServedModel(tf.Module):
    """Holds variables and vocabularies; `add_functions` makes the functions of its signatures.

    Args:
        backbone: its variables are taken over as they are, where nothing has to be cast.
        preprocessor: makes ids of strings.
    """

    def __init__(self, backbone: GemmaBackbone, preprocessor: GemmaCausalLMPreprocessor) -> None:
        super().__init__()
        tensors = backbone.tensors()
        leaves = [leaf for leaf in tf.nest.flatten(tensors) if leaf is not None]
        self.weights = [
            leaf if isinstance(leaf, tf.Variable) else tf.Variable(leaf) for leaf in leaves
        ]
        del leaves
        places = iter(range(len(self.weights)))
        structure = tf.nest.map_structure(
            lambda leaf: -1 if leaf is None else next(places), tensors
        )
        self.read_weights = lambda: tf.nest.map_structure(
            lambda place: None if place < 0 else tf.convert_to_tensor(self.weights[place]),
            structure,
        )
        self.text = GraphText(preprocessor.tokenizer.pieces)


class Graphs:
    """What the functions do.

    Args:
        served: weights and vocabularies.
        backbone, preprocessor: what they are of.
        options: the defaults of a call, and limits.
    """

    def __init__(
        self,
        served: ServedModel,
        backbone: GemmaBackbone,
        preprocessor: GemmaCausalLMPreprocessor,
        options: ServingOptions,
    ) -> None:
        self.weights, self.text = served.read_weights, served.text
        self.config, self.options = backbone.config, options
        self.tokenizer = preprocessor.tokenizer
        self.starts = preprocessor.add_start_token
        self.model = model_of(self.config, backbone.compute_dtype)
        quantization = backbone.quantization
        small = SMALL_BATCHES[quantization.bits("matrix") if quantization else 16]
        most = options.max_batch_size
        sizes: list[int | None] = [size for size in range(1, small + 1) if size <= (most or size)]
        if most is None or most > small:
            sizes.append(None)
        self.decoder = Decoder(
            self.model,
            stop_array(options.stop_token_ids),
            self.tokenizer.special_token_ids,
            self.text.size,
            self.text.decode,
            sizes,
        )

    def prompt_ids(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Strings `[B]` as ids `[B, (T)]`, with one start token where it is due."""
        ids = self.text.encode(texts)
        if not self.starts:
            return ids
        start = self.tokenizer.start_token_id
        there = tf.reduce_any(ids[:, :1] == start, axis=1)
        return tf.concat([_column(start, ~there), ids], axis=1)

    def complete(self, prompts: tf.RaggedTensor, settings: Settings) -> dict[str, tf.Tensor]:
        """Continue ids `[B, (T)]`."""
        lengths = tf.cast(prompts.row_lengths(), tf.int32)
        context = self.config.context_length
        with tf.control_dependencies(
            [
                *check_settings(settings),
                *self._check_batch(tf.shape(lengths)[0]),
                check(
                    lengths < context,
                    f"A prompt must leave room in the model's context of {context} tokens: "
                    "shorten it. Received, tokens:",
                    lengths,
                ),
                check(lengths > 0, "A prompt has no tokens. Received, tokens:", lengths),
            ]
        ):
            prompts = tf.identity(prompts)
        end = self.decoder.run(self.weights(), prompts, settings)
        text, start = end.text, tf.cast(prompts.row_lengths(), tf.int32)
        new = self.text.decode(self.decoder.written(text, start, end.length))
        whole = self.text.decode(self.decoder.written(text, tf.zeros_like(start), end.length))
        cut = tf.where(end.kept < 0, 0, tf.strings.length(new) - end.kept)
        last = tf.gather(text, end.length - 1, axis=1, batch_dims=1)
        ended = is_stop_token(last, self.decoder.stop_token_ids) | (end.kept >= 0)
        place = tf.range(tf.shape(text)[1])[None]
        here = (place >= start[:, None]) & (place < end.length[:, None])
        return {
            "text": _without_end(whole, cut),
            "new_text": _without_end(new, cut),
            "token_ids": tf.ragged.boolean_mask(text, here).to_tensor(self.tokenizer.pad_token_id),
            "lengths": end.length - start,
            "finish_reason": tf.where(ended, "stop", "length"),
        }

    def score(self, texts: tf.Tensor, continuations: tf.Tensor) -> dict[str, tf.Tensor]:
        """The likelihood of strings `[B]`, or of their continuations `[B]` where there are some."""
        batch, given = tf.shape(texts)[0], tf.shape(continuations)[0]
        same = check(
            (given == 0) | (given == batch),
            "`continuations` must be as many as `texts`, or none. Received:",
            given,
        )
        with tf.control_dependencies([same, *self._check_batch(batch)]):
            more = tf.cond(given > 0, lambda: continuations, lambda: tf.fill([batch], ""))
        ids = self.prompt_ids(tf.strings.join([texts, more]))
        before = tf.cast(self.prompt_ids(rstrip(texts)).row_lengths(), tf.int32)
        start = tf.where(given > 0, tf.maximum(before, 1), 1)
        context, lengths = self.config.context_length, ids.row_lengths()
        fits = check(
            lengths <= context,
            f"A text must fit into the model's context of {context} tokens. Received, tokens:",
            lengths,
        )
        with tf.control_dependencies([fits]):
            ids = tf.identity(ids)
        return score(self.weights(), ids, start, self.model)

    def tokenize(self, texts: tf.Tensor) -> dict[str, tf.Tensor]:
        """Ids of strings `[B]`, as `GemmaTokenizer` makes them."""
        ids, tokenizer = self.text.encode(texts), self.tokenizer
        always = tf.ones_like(ids.row_lengths(), tf.bool)
        if tokenizer.add_bos:
            ids = tf.concat([_column(tokenizer.start_token_id, always), ids], axis=1)
        if tokenizer.add_eos:
            ids = tf.concat([ids, _column(tokenizer.end_token_id, always)], axis=1)
        if tokenizer.sequence_length is not None:
            ids = ids[:, : tokenizer.sequence_length]
        return {
            "token_ids": ids.to_tensor(
                tokenizer.pad_token_id, shape=[None, tokenizer.sequence_length]
            ),
            "lengths": tf.cast(ids.row_lengths(), tf.int32),
        }

    def detokenize(self, token_ids: tf.Tensor) -> dict[str, tf.Tensor]:
        """The texts of ids `[B, T]`; padding is nothing."""
        size = self.text.size
        fits = check(
            (token_ids >= 0) & (token_ids < size),
            f"`token_ids` must be in the vocabulary's range [0, {size}). Received:",
            token_ids,
        )
        with tf.control_dependencies([fits]):
            ids = tf.identity(token_ids)
        return {"text": self.text.decode(tf.RaggedTensor.from_tensor(ids))}

    def _check_batch(self, batch: tf.Tensor) -> list[tf.Operation]:
        most = self.options.max_batch_size
        checks = [check(batch > 0, "There must be a text at least. Received, texts:", batch)]
        if most is not None:
            message = f"There may be {most} texts at a time, `max_batch_size`. Received, texts:"
            checks.append(check(batch <= most, message, batch))
        return checks


def add_functions(
    served: ServedModel, graphs: Graphs, say: Callable[[str], None]
) -> dict[str, Any]:
    """Make the functions of `served`, its attributes; they are returned by name.

    `say` is told when one of them is traced. Called from Python their settings have defaults, and
    so have the signatures for whoever heeds those, as TensorFlow Serving does.
    """
    values = {name: getattr(graphs.options, name) for name in Settings._fields}
    values["stop"] = np.array(values["stop"], object)  # of strings, also where there are none
    values["continuations"] = np.array([], object)
    defaults = {name: tf.constant(value, INPUTS[name].dtype) for name, value in values.items()}

    def function(python: Callable[..., Any], *names: str) -> Any:
        """`python` as a function of the inputs `names`."""

        def traced(*inputs: tf.Tensor) -> Any:
            say(f"Tracing {python.__name__}")
            return python(*inputs)

        traced.__name__ = python.__name__
        kind, none = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
        traced.__signature__ = inspect.Signature(
            [inspect.Parameter(name, kind, default=defaults.get(name, none)) for name in names]
        )
        specs = [INPUTS[name] for name in names]
        return tf.function(traced, input_signature=specs, autograph=False)

    def generate(prompts: tf.Tensor, *settings: tf.Tensor) -> dict[str, tf.Tensor]:
        return graphs.complete(graphs.prompt_ids(prompts), Settings(*settings))

    made = {
        "generate": function(generate, "prompts", *Settings._fields),
        "score": function(graphs.score, "texts", "continuations"),
        "tokenize": function(graphs.tokenize, "texts"),
        "detokenize": function(graphs.detokenize, "token_ids"),
    }
    if graphs.tokenizer.end_of_turn_token_id is not None:
        template = ChatTemplate(graphs.text, graphs.tokenizer)

        def chat(
            roles: tf.Tensor, contents: tf.Tensor, *settings: tf.Tensor
        ) -> dict[str, tf.Tensor]:
            answer = graphs.complete(template.render(roles, contents), Settings(*settings))
            reply = answer.pop("new_text")
            return {**answer, "reply": reply}

        made["chat"] = function(chat, "roles", "contents", *Settings._fields)
    for name, function in made.items():
        setattr(served, name, function)
    return {"serving_default": made["generate"], **made}


def _column(id: int, where: tf.Tensor) -> tf.RaggedTensor:
    """`id` in the rows that are true in `where [B]`, and nothing in the others."""
    return tf.ragged.boolean_mask(tf.fill([tf.shape(where)[0], 1], id), where[:, None])


def _without_end(texts: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """Strings `[B]` without their last `size [B]` bytes."""
    return tf.strings.substr(texts, tf.zeros_like(size), tf.strings.length(texts) - size)
