"""Text to text: tokenizer, backbone, head and sampler in one model.

Everything below this module deals in ids; strings end here.
"""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_gemma import tf_data
from keras_gemma.causal_lm.conversational import Conversational
from keras_gemma.causal_lm.draft import read_draft
from keras_gemma.causal_lm.model_of_text import ModelOfText
from keras_gemma.causal_lm.prompts import Prompts, read_prompt, read_prompts
from keras_gemma.causal_lm.settings import GenerationSettings, read_settings
from keras_gemma.causal_lm.text_request import Job
from keras_gemma.causal_lm.training_step import TrainsInChunks
from keras_gemma.export.exportable import Exportable
from keras_gemma.generation import samplers
from keras_gemma.generation.generate import prefill
from keras_gemma.generation.programs import Programs
from keras_gemma.generation.request import Draft, Prefix
from keras_gemma.lora.adaptable import Adaptable
from keras_gemma.lora.adapters import Adapters
from keras_gemma.model.backbone import GemmaBackbone, check_layer_arguments
from keras_gemma.model.quantizable import Quantizable
from keras_gemma.presettable import Presettable
from keras_gemma.quantization import QuantizationConfig
from keras_gemma.scoring.scorable import Scorable
from keras_gemma.storage.savable import Savable
from keras_gemma.text.batches import is_text
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor


@keras.saving.register_keras_serializable(package="keras_gemma")
class GemmaCausalLM(
    Presettable,
    Savable,
    Conversational,
    Scorable,
    Quantizable,
    Adaptable,
    TrainsInChunks,
    Exportable,
    ModelOfText,
):
    """Gemma with its head: generates, scores and trains on text.

    As a Keras model it maps `{"token_ids", "padding_mask"}`, both `[B, T]`, to logits, float32
    `[B, T, V]`. With a preprocessor, `fit`, `evaluate`, `predict` and `generate` take strings.

    Args:
        backbone: a `GemmaBackbone`.
        preprocessor: a `GemmaCausalLMPreprocessor`, or None to deal in ids.

    Example:

    ```python
    import keras_gemma

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    lm.generate("ROMEO:", max_new_tokens=32)

    lm.compile(sampler=keras_gemma.samplers.TopKSampler(k=5, seed=1))
    lm.generate(["ROMEO:", "To be, or"], max_length=48)

    lm.fit(["First Citizen:\\nSpeak, speak."], batch_size=1)
    ```
    """

    backbone_cls = GemmaBackbone
    preprocessor_cls = GemmaCausalLMPreprocessor

    def __init__(
        self,
        backbone: GemmaBackbone,
        preprocessor: GemmaCausalLMPreprocessor | None = None,
        **kwargs: Any,
    ) -> None:
        check_layer_arguments(type(self), kwargs)
        if not isinstance(backbone, GemmaBackbone):
            raise TypeError(f"`backbone` must be a GemmaBackbone. Received: {backbone!r}")
        if preprocessor is not None:
            if not isinstance(preprocessor, GemmaCausalLMPreprocessor):
                raise TypeError(
                    "`preprocessor` must be a GemmaCausalLMPreprocessor, or None. "
                    f"Received: {preprocessor!r}"
                )
            size = preprocessor.tokenizer.vocabulary_size()
            if size > backbone.config.vocabulary_size:
                raise ValueError(
                    f"The tokenizer makes ids up to {size - 1}, and the backbone embeds "
                    f"{backbone.config.vocabulary_size}. Use the vocabulary that the backbone was "
                    "made with, or a backbone with `vocabulary_size` as large."
                )
        logits = backbone.token_embedding(backbone(backbone.input), reverse=True)
        super().__init__(inputs=backbone.input, outputs=logits, **kwargs)
        backbone.around.add(self)
        self.dtype_policy = backbone.dtype_policy
        self.preprocessor = preprocessor
        self.sampler = samplers.get("greedy")
        self._programs: Programs | None = None
        # Ready to use as it is: `compile` is for those who want something else.
        self.compile()

    @property
    def backbone(self) -> GemmaBackbone:
        """The model without its head."""
        return next(layer for layer in self.layers if isinstance(layer, GemmaBackbone))

    @property
    def adapters(self) -> Adapters:
        """Those of the backbone."""
        return self.backbone.adapters

    def compile(
        self,
        optimizer: Any = "auto",
        loss: Any = "auto",
        *,
        weighted_metrics: Any = "auto",
        sampler: Any = "greedy",
        **kwargs: Any,
    ) -> None:
        """Choose how to train and how to sample.

        Args:
            optimizer: `"auto"` is Adam at 2e-5.
            loss: `"auto"` is cross entropy of the next token. With it, and no metric but its
                accuracy, `fit` and `evaluate` take the memory of few positions' logits.
            weighted_metrics: `"auto"` is its accuracy.
            sampler: a name such as `"top_p"` (see `samplers`), or a `samplers.Sampler`.
            **kwargs: settings of generation, those of `GenerationSettings`, which a call may
                change; and as of `keras.Model.compile`. With `run_eagerly=True` PyTorch
                generates without compiling, slower by the token and at once from the start.
                A `.keras` file keeps all of them, but of `logits_processors` only what is
                registered with Keras: compile again, once it is loaded, with the others.
        """
        names = GenerationSettings.__dataclass_fields__.keys() & kwargs.keys()
        settings = GenerationSettings(**{name: kwargs.pop(name) for name in names})
        sampler = samplers.get(sampler)
        settings.choose_sampler(sampler)  # raises where they do not go together
        self.sampler, self.generation_settings = sampler, settings
        if isinstance(loss, str) and loss == "auto":
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        if isinstance(weighted_metrics, str) and weighted_metrics == "auto":
            weighted_metrics = [keras.metrics.SparseCategoricalAccuracy()]
        self.take_loss_in_chunks(loss, kwargs.get("metrics"), weighted_metrics)
        super().compile(
            optimizer=keras.optimizers.Adam(2e-5) if optimizer == "auto" else optimizer,
            loss=loss,
            weighted_metrics=weighted_metrics,
            **kwargs,
        )

    def get_compile_config(self) -> dict[str, Any]:
        """What `compile` was given, for `.keras` files."""
        return {
            **super().get_compile_config(),
            "sampler": keras.saving.serialize_keras_object(self.sampler),
            **self.generation_settings.serialize(),
            "optimizer_built": self.optimizer is not None and self.optimizer.built,
        }

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile as `get_compile_config` says, with the optimizer's variables if it had them."""
        config = dict(config)
        optimizer_built = config.pop("optimizer_built", False)
        self.compile(**keras.saving.deserialize_keras_object(config))
        if optimizer_built:
            self.optimizer.build(self.trainable_variables)

    def generate(
        self,
        inputs: Any,
        max_length: int | None = None,
        stop_token_ids: Any = "auto",
        strip_prompt: bool = False,
        *,
        prefix: Prefix | None = None,
        draft: Any = None,
        num_draft_tokens: int | None = None,
        **settings: Any,
    ) -> Any:
        """Continue `inputs`.

        Args:
            inputs: a string, or a list of strings; ids as a list of lists of any lengths, or as
                `{"token_ids", "padding_mask"}` of `[B, S]`, where the mask is true at the prompt
                and S is the most tokens, prompt included; or a `tf.data.Dataset` of batches.
            max_length: the most tokens of a row, prompt included. By default the preprocessor's
                `sequence_length`.
            stop_token_ids: ids that end a row. `"auto"`: those given to `compile`, else `<eos>`
                and `<end_of_turn>`; None: none.
            strip_prompt: return the new text alone.
            prefix: of `prefill`; what the prompts share with it is not read again.
            draft: who guesses tokens that are then read at once, which pays where the guesses
                are good: a smaller `GemmaCausalLM` with the same vocabulary, or `"prompt"`, which
                takes them from the text where it repeats itself. What is generated stays the same:
                greedy text token for token, but where rounding decides, and otherwise in its
                distribution. With `return_logprobs`, `Completion.acceptance_rate` tells how good
                the guesses were.
            num_draft_tokens: how many are guessed at a time; 4 by default.
            **settings: those of `GenerationSettings`, instead of those given to `compile`:
                `max_new_tokens`, `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`,
                `seed`, `stop`, `num_return_sequences`, `logits_processors`, `return_logprobs`,
                `sampler`.

        Returns:
            A string for a string, a list for a list; for a dict, `{"token_ids", "padding_mask"}`
            of the same shape, the mask true at prompt and continuation. Of a data set, the rows
            of all batches. With `num_return_sequences` above 1, a list for each prompt; with
            `return_logprobs`, `Completion`s.

        Raises:
            ValueError: a prompt that is empty or leaves no room; ids outside the vocabulary;
                settings out of range or that exclude each other; strings without a preprocessor;
                a batch too large for the memory that is free.
            TypeError: a setting that is none.
        """
        given = self._settings("generate", max_length, stop_token_ids, settings)
        guesses = self._draft(draft, num_draft_tokens)
        if tf_data.is_dataset(inputs):
            batches = [
                self._job(batch, given, prefix, guesses).complete(strip_prompt)
                for batch in inputs.as_numpy_iterator()
            ]
            if not batches:
                raise ValueError("The data set of prompts is empty.")
            if isinstance(batches[0], dict):
                return {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
            return [row for batch in batches for row in ([batch] if is_text(batch) else batch)]
        return self._job(inputs, given, prefix, guesses).complete(strip_prompt)

    def stream(
        self,
        inputs: Any,
        max_length: int | None = None,
        stop_token_ids: Any = "auto",
        *,
        prefix: Prefix | None = None,
        draft: Any = None,
        num_draft_tokens: int | None = None,
        **settings: Any,
    ) -> Iterator[str] | Iterator[list[str]]:
        """The text that follows `inputs`, piece by piece as it is made.

        No piece ends within a character, and none holds what may become a stop string. Closing
        the iterator ends the work.

        Args:
            inputs: a string, or a list of strings, or of lists of ids.
            max_length, stop_token_ids, prefix, draft, num_draft_tokens, **settings: as of
                `generate`.

        Returns:
            An iterator of strings; for a list of prompts, of lists with one string a row, which
            is empty where a row has nothing new.

        Raises:
            ValueError, TypeError: as `generate`, before the first piece is asked for.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        for piece in lm.stream("ROMEO:", max_new_tokens=20, temperature=0.8, seed=1):
            print(piece, end="", flush=True)
        ```
        """
        given = self._settings("stream", max_length, stop_token_ids, settings)
        if given.top_log_probabilities is not None:
            raise ValueError("`stream` yields text alone: use `generate` with `return_logprobs`.")
        guesses = self._draft(draft, num_draft_tokens)
        return self._job(inputs, given, prefix, guesses).stream()

    def prefill(self, inputs: Any) -> Prefix:
        """Read the beginning of texts, so that `generate` and `stream` go on from there.

        What a prompt does not share with it is read as ever: results do not depend on it.

        Args:
            inputs: a string, or a list of ids.

        Returns:
            What to pass as `prefix`. It holds for this model and its weights as they are.

        Raises:
            ValueError: a text that is empty or leaves no room in the context, several texts, ids
                outside the vocabulary.
            TypeError: no text.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        scene = "First Citizen:\\nBefore we proceed any further, hear me speak.\\n\\n"
        prefix = lm.prefill(scene)
        lm.generate([scene + "All:", scene + "ROMEO:"], max_new_tokens=10, prefix=prefix)
        ```
        """
        ids = read_prompt(inputs, self.preprocessor, self.backbone.config.vocabulary_size)
        return prefill(self._generator(), ids)

    def _settings(
        self, caller: str, max_length: int | None, stop_token_ids: Any, settings: dict[str, Any]
    ) -> GenerationSettings:
        """The settings of a call, over those of `compile`."""
        given = {"max_length": max_length, "stop_token_ids": stop_token_ids, **settings}
        return read_settings(given, caller).over(self.generation_settings)

    def _draft(self, draft: Any, tokens: int | None) -> Draft | None:
        return read_draft(draft, tokens, GemmaCausalLM)

    def _job(
        self,
        inputs: Any,
        settings: GenerationSettings,
        prefix: Prefix | None,
        draft: Draft | None,
    ) -> Job:
        size = self.backbone.config.vocabulary_size
        prompts = inputs
        if not isinstance(inputs, Prompts):
            prompts = read_prompts(inputs, self.preprocessor, size)
        generator, sampler = self._generator(), self.sampler
        return Job(generator, self.preprocessor, prompts, settings, sampler, prefix, draft)

    def _generator(self) -> Programs:
        # Its programs outlive `compile`: another sampler of the same kind compiles nothing.
        if self._programs is None or self._programs.eager != self.run_eagerly:
            self._programs = Programs(self.backbone, eager=self.run_eagerly)
        return self._programs

    def _quantize(self, config: QuantizationConfig, calibration: Any) -> None:
        rows = None
        if calibration is not None and self.backbone.quantization is None:
            calibration = [calibration] if is_text(calibration) else calibration
            size = self.backbone.config.vocabulary_size
            rows = read_prompts(calibration, self.preprocessor, size, "calibration").ids
        self.backbone._quantize(config, rows)

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "trainable": self.trainable,
            "backbone": keras.saving.serialize_keras_object(self.backbone),
            "preprocessor": keras.saving.serialize_keras_object(self.preprocessor),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "GemmaCausalLM":
        config = dict(config)
        trainable = config.pop("trainable", True)
        for name in ("backbone", "preprocessor"):
            if isinstance(config.get(name), dict):
                config[name] = keras.saving.deserialize_keras_object(config[name])
        lm = cls(**config)
        if not trainable:  # True would wake what quantization froze
            lm.trainable = False
        return lm
