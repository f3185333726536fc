"""The causal language model: tokenizer, backbone, language-model head and sampler.

Everything below this module works on token ids; strings end here.
"""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_gemma import tf_data
from keras_gemma.causal_lm.conversational import Conversational
from keras_gemma.causal_lm.draft import read_draft
from keras_gemma.causal_lm.model_of_text import TextTrainer
from keras_gemma.causal_lm.prompts import Prompts, read_prompt, read_prompts
from keras_gemma.causal_lm.settings import GenerationSettings, read_settings
from keras_gemma.causal_lm.text_request import TextRequest
from keras_gemma.causal_lm.training_step import ChunkedLossTrainer
from keras_gemma.export.exportable import Exportable
from keras_gemma.generation import samplers
from keras_gemma.generation.generate import prefill
from keras_gemma.generation.programs import Programs
from keras_gemma.generation.request import Draft, PrefixCache
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
    ChunkedLossTrainer,
    Exportable,
    TextTrainer,
):
    """Gemma with a language-model head: generates, scores and trains on text.

    As a Keras model it maps `{"token_ids", "padding_mask"}`, both `[B, T]`, to logits, float32
    `[B, T, V]`. With a preprocessor, `fit`, `evaluate`, `predict` and `generate` take strings.

    Args:
        backbone: A `GemmaBackbone`.
        preprocessor: A `GemmaCausalLMPreprocessor`. `None` restricts the model to token ids.

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
                    f"The tokenizer has {size} ids, but the backbone's vocabulary_size is "
                    f"{backbone.config.vocabulary_size}. Use the tokenizer of the backbone's "
                    "preset, or a backbone with a larger `vocabulary_size`."
                )
        logits = backbone.token_embedding(backbone(backbone.input), reverse=True)
        super().__init__(inputs=backbone.input, outputs=logits, **kwargs)
        backbone.around.add(self)
        self.dtype_policy = backbone.dtype_policy
        self.preprocessor = preprocessor
        self.sampler = samplers.get("greedy")
        self._programs: Programs | None = None
        # Usable at once: calling `compile` again is only needed for other settings.
        self.compile()

    @property
    def backbone(self) -> GemmaBackbone:
        """The `GemmaBackbone`, without the language-model head."""
        return next(layer for layer in self.layers if isinstance(layer, GemmaBackbone))

    @property
    def adapters(self) -> Adapters:
        """LoRA adapters of the backbone."""
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
        """Configures the model for training and generation.

        Args:
            optimizer: A Keras optimizer, or `"auto"` for Adam with a learning rate of 2e-5.
            loss: A Keras loss, or `"auto"` for the cross entropy of the next token. With the
                default loss and metric, `fit` and `evaluate` compute the logits in chunks, which
                saves memory.
            weighted_metrics: Keras metrics, or `"auto"` for the next-token accuracy.
            sampler: A sampler name such as `"top_p"` (see `samplers`), or a `samplers.Sampler`.
            **kwargs: Default `GenerationSettings`, which each call can override, and arguments of
                `keras.Model.compile`. With `run_eagerly=True`, generation on PyTorch starts
                without a compilation, but each token takes longer. `.keras` files save these
                settings. Of `logits_processors`, they only save functions and objects that are
                registered with Keras.
        """
        names = GenerationSettings.__dataclass_fields__.keys() & kwargs.keys()
        settings = GenerationSettings(**{name: kwargs.pop(name) for name in names})
        sampler = samplers.get(sampler)
        settings.choose_sampler(sampler)  # checks that they are compatible
        self.sampler, self.generation_settings = sampler, settings
        if isinstance(loss, str) and loss == "auto":
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        if isinstance(weighted_metrics, str) and weighted_metrics == "auto":
            weighted_metrics = [keras.metrics.SparseCategoricalAccuracy()]
        self._set_chunked_loss(loss, kwargs.get("metrics"), weighted_metrics)
        super().compile(
            optimizer=keras.optimizers.Adam(2e-5) if optimizer == "auto" else optimizer,
            loss=loss,
            weighted_metrics=weighted_metrics,
            **kwargs,
        )

    def get_compile_config(self) -> dict[str, Any]:
        """Returns the arguments of `compile`, for `.keras` files."""
        return {
            **super().get_compile_config(),
            "sampler": keras.saving.serialize_keras_object(self.sampler),
            **self.generation_settings.serialize(),
            "optimizer_built": self.optimizer is not None and self.optimizer.built,
        }

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles the model from the dict of `get_compile_config`, and builds the optimizer."""
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
        prefix: PrefixCache | None = None,
        draft: Any = None,
        num_draft_tokens: int | None = None,
        **settings: Any,
    ) -> Any:
        """Generates text that continues the prompts.

        Args:
            inputs: A string or a list of strings. Alternatively token ids: a list of lists, or a
                dict `{"token_ids", "padding_mask"}` of arrays `[B, S]`. The mask is True at prompt
                tokens, and S is the maximum length. A `tf.data.Dataset` yields batches of these.
            max_length: Maximum number of tokens per sequence, including the prompt. Defaults to
                the preprocessor's `sequence_length`.
            stop_token_ids: Token ids that stop generation. `None` disables stop tokens. `"auto"`
                uses the ids passed to `compile()`, or `<eos>` and `<end_of_turn>` if none were
                passed.
            strip_prompt: If True, returns only the new text.
            prefix: Prefix cache returned by `prefill`. Prompt tokens that it contains are not
                processed again.
            draft: Draft for speculative decoding: a smaller `GemmaCausalLM` with the same
                vocabulary, or `"prompt"` for prompt-lookup decoding. The output is unchanged:
                identical tokens with greedy sampling (up to floating-point ties), and the same
                distribution otherwise. `Completion.acceptance_rate` reports the quality of the
                draft.
            num_draft_tokens: Number of draft tokens per verification. Defaults to 4.
            **settings: `GenerationSettings` that override those passed to `compile`:
                `max_new_tokens`, `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`,
                `seed`, `stop`, `num_return_sequences`, `logits_processors`, `return_logprobs`,
                `sampler`.

        Returns:
            A string for a string, and a list for a list or a dataset. For a dict, a dict of the
            same shapes whose mask is True at the prompt and the new tokens. If
            `num_return_sequences` is above 1, each prompt gets a list. With `return_logprobs`,
            each text is a `Completion`.

        Raises:
            ValueError: If a prompt is empty or too long, an id is outside the vocabulary, a setting
                is out of range, settings exclude each other, strings are passed to a model without
                a preprocessor, or the batch needs more than the free memory.
            TypeError: If a setting is unknown or has the wrong type.
        """
        call_settings = self._settings("generate", max_length, stop_token_ids, settings)
        draft = self._draft(draft, num_draft_tokens)
        if tf_data.is_dataset(inputs):
            batches = [
                self._text_request(batch, call_settings, prefix, draft).complete(strip_prompt)
                for batch in inputs.as_numpy_iterator()
            ]
            if not batches:
                raise ValueError("The dataset of prompts is empty.")
            if isinstance(batches[0], dict):
                return {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
            return [row for batch in batches for row in ([batch] if is_text(batch) else batch)]
        return self._text_request(inputs, call_settings, prefix, draft).complete(strip_prompt)

    def stream(
        self,
        inputs: Any,
        max_length: int | None = None,
        stop_token_ids: Any = "auto",
        *,
        prefix: PrefixCache | None = None,
        draft: Any = None,
        num_draft_tokens: int | None = None,
        **settings: Any,
    ) -> Iterator[str] | Iterator[list[str]]:
        """Generates text and yields it in pieces as soon as they are available.

        Pieces consist of complete characters and never contain part of a stop string. Closing
        the iterator stops generation.

        Args:
            inputs: A string, a list of strings, or a list of lists of token ids.
            max_length, stop_token_ids, prefix, draft, num_draft_tokens, **settings: Same as in
                `generate`.

        Returns:
            An iterator of strings. For a list of prompts, an iterator of lists with one string
            per sequence, which is empty if the sequence has no new text.

        Raises:
            ValueError, TypeError: Same as in `generate`. Raised by the call, before iteration.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        for piece in lm.stream("ROMEO:", max_new_tokens=20, temperature=0.8, seed=1):
            print(piece, end="", flush=True)
        ```
        """
        call_settings = self._settings("stream", max_length, stop_token_ids, settings)
        if call_settings.top_log_probabilities is not None:
            raise ValueError(
                "`stream` does not support `return_logprobs`: use `generate` with "
                f"`return_logprobs`. Received: return_logprobs={call_settings.return_logprobs!r}"
            )
        draft = self._draft(draft, num_draft_tokens)
        return self._text_request(inputs, call_settings, prefix, draft).stream()

    def prefill(self, inputs: Any) -> PrefixCache:
        """Computes a prefix cache for prompts that begin with the same text.

        A prompt may share all of the prefix, a part of it, or nothing. The cache only affects
        speed, never results.

        Args:
            inputs: A string, or a list of token ids.

        Returns:
            The prefix cache, to be passed as `prefix` to `generate` or `stream`. It is valid for
            this model until its weights change.

        Raises:
            ValueError: If the text is empty or too long, several texts are passed, or an id is
                outside the vocabulary.
            TypeError: If `inputs` is neither a string nor a list of token ids.

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
        """Returns the settings of a call, filled up with those of `compile`."""
        settings = {"max_length": max_length, "stop_token_ids": stop_token_ids, **settings}
        return read_settings(settings, caller).over(self.generation_settings)

    def _draft(self, draft: Any, tokens: int | None) -> Draft | None:
        return read_draft(draft, tokens, GemmaCausalLM)

    def _text_request(
        self,
        inputs: Any,
        settings: GenerationSettings,
        prefix: PrefixCache | None,
        draft: Draft | None,
    ) -> TextRequest:
        size = self.backbone.config.vocabulary_size
        prompts = inputs
        if not isinstance(inputs, Prompts):
            prompts = read_prompts(inputs, self.preprocessor, size)
        programs, sampler = self._generator(), self.sampler
        return TextRequest(programs, self.preprocessor, prompts, settings, sampler, prefix, draft)

    def _generator(self) -> Programs:
        # Kept across `compile`, because another sampler of the same kind can reuse the programs.
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
        if not trainable:  # Setting True would unfreeze quantized weights.
            lm.trainable = False
        return lm
