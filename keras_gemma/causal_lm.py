"""Text to text: tokenizer, backbone, head and sampler in one model.

Everything below this module deals in ids; strings end here.
"""

from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_gemma import tf_data
from keras_gemma.generation import samplers
from keras_gemma.generation.generator import Generator
from keras_gemma.model.backbone import GemmaBackbone, check_layer_arguments
from keras_gemma.presettable import Presettable
from keras_gemma.scoring.score import Intercept, score
from keras_gemma.storage.gguf_writer import save_to_gguf
from keras_gemma.storage.hugging_face_writer import save_to_hugging_face
from keras_gemma.text.batches import is_text
from keras_gemma.text.model_of_text import ModelOfText
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor
from keras_gemma.text.reading import to_ids, to_numpy


@keras.saving.register_keras_serializable(package="keras_gemma")
class GemmaCausalLM(Presettable, ModelOfText):
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
        self.dtype_policy = backbone.dtype_policy
        self.preprocessor = preprocessor
        self.sampler = samplers.get("greedy")
        self._generator: Generator | None = None
        # Ready to use as it is: `compile` is for those who want something else.
        self.compile()

    @property
    def backbone(self) -> GemmaBackbone:
        """The model without its head."""
        return next(layer for layer in self.layers if isinstance(layer, GemmaBackbone))

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
            loss: `"auto"` is cross entropy of the next token.
            weighted_metrics: `"auto"` is its accuracy.
            sampler: `"greedy"`, `"random"`, `"top_k"`, `"top_p"`, or a `samplers.Sampler`.
            **kwargs: as of `keras.Model.compile`; with `run_eagerly=True` PyTorch generates
                without compiling, slower by the token and at once from the start.
        """
        self.sampler = samplers.get(sampler)
        super().compile(
            optimizer=keras.optimizers.Adam(2e-5) if optimizer == "auto" else optimizer,
            loss=(
                keras.losses.SparseCategoricalCrossentropy(from_logits=True)
                if isinstance(loss, str) and loss == "auto"
                else loss
            ),
            weighted_metrics=(
                [keras.metrics.SparseCategoricalAccuracy()]
                if isinstance(weighted_metrics, str) and weighted_metrics == "auto"
                else weighted_metrics
            ),
            **kwargs,
        )

    def get_compile_config(self) -> dict[str, Any]:
        """What `compile` was given, for `.keras` files."""
        return {
            **super().get_compile_config(),
            "sampler": keras.saving.serialize_keras_object(self.sampler),
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
        max_new_tokens: int | None = None,
        seed: int | None = None,
    ) -> Any:
        """Continue `inputs`.

        Args:
            inputs: a string, or a list of strings; ids as a list of lists of any lengths, or as
                `{"token_ids", "padding_mask"}` of `[B, S]`, where the mask is true at the prompt
                and S is the most tokens, prompt included; or a `tf.data.Dataset` of batches.
            max_length: the most tokens of a row, prompt included. By default the preprocessor's
                `sequence_length`.
            stop_token_ids: ids that end a row. `"auto"`: `<eos>` and `<end_of_turn>`; None: none.
            strip_prompt: return the new text alone.
            max_new_tokens: the most new tokens of a row, instead of `max_length`.
            seed: an integer makes this call repeat, whatever the sampler's own seed.

        Returns:
            A string for a string, a list for a list; for a dict, `{"token_ids", "padding_mask"}`
            of the same shape, the mask true at prompt and continuation. Of a data set, the rows
            of all batches.

        Raises:
            ValueError: a prompt that is empty or leaves no room; ids outside the vocabulary;
                both limits given; strings without a preprocessor.
        """
        if max_length is not None and max_new_tokens is not None:
            raise ValueError(
                "Give `max_length` (prompt included) or `max_new_tokens`, not both. Received: "
                f"max_length={max_length}, max_new_tokens={max_new_tokens}"
            )
        for name, value in (("max_length", max_length), ("max_new_tokens", max_new_tokens)):
            if value is not None and (isinstance(value, bool) or not _is_positive(value)):
                raise ValueError(f"`{name}` must be an integer >= 1. Received: {name}={value!r}")
        options = (max_length, max_new_tokens, self._stop_ids(stop_token_ids), strip_prompt, seed)
        if tf_data.is_dataset(inputs):
            batches = [self._generate(batch, *options) for batch in inputs.as_numpy_iterator()]
            if not batches:
                raise ValueError("The data set of prompts is empty.")
            if isinstance(batches[0], dict):
                return {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
            return [row for batch in batches for row in ([batch] if is_text(batch) else batch)]
        return self._generate(inputs, *options)

    def _generate(
        self,
        inputs: Any,
        max_length: int | None,
        max_new_tokens: int | None,
        stop_ids: tuple[int, ...],
        strip_prompt: bool,
        seed: int | None,
    ) -> Any:
        """One batch."""
        if isinstance(inputs, dict):
            limits = max_length, max_new_tokens
            return self._generate_padded(inputs, *limits, stop_ids, strip_prompt, seed)
        if not (is_text(inputs) or isinstance(inputs, list | tuple) or hasattr(inputs, "ndim")):
            raise TypeError(
                "`inputs` must be a string, a list of strings or of lists of ids, a dict of "
                f"arrays, or a `tf.data.Dataset` of them. Received: {inputs!r:.200}"
            )
        texts = inputs if is_text(inputs) else list(inputs)
        single = is_text(texts)
        if single:
            texts = [texts]
        as_text = bool(texts) and is_text(texts[0])
        if as_text:
            self._require_preprocessor()
            prompts = self.preprocessor.tokenize_prompts(texts)
        else:
            if any(np.ndim(ids) == 0 and not is_text(ids) for ids in texts):
                raise ValueError(
                    "Ids must come in a batch: pass a list of lists of ids, or an array "
                    f"[batch, tokens]. Received: {inputs!r:.80}"
                )
            size = self.backbone.config.vocabulary_size
            prompts = [to_ids(f"inputs[{i}]", ids, 1, size) for i, ids in enumerate(texts)]
        if max_new_tokens is None:
            if max_length is None:
                self._require_preprocessor("`max_length` or `max_new_tokens`")
                max_length = min(
                    self.preprocessor.sequence_length, self.backbone.config.context_length
                )
            for i, prompt in enumerate(prompts):
                if len(prompt) >= max_length:
                    raise ValueError(
                        f"Prompt {i} has {len(prompt)} tokens, which leaves no room to generate "
                        f"within max_length={max_length}. Pass a larger `max_length`, or "
                        "`max_new_tokens`, or a shorter prompt."
                    )
            room = [max_length - len(prompt) for prompt in prompts]
        else:
            room = [max_new_tokens] * len(prompts)
        new = self._generate_ids(prompts, room, stop_ids, seed)
        rows = [
            np.concatenate([[] if strip_prompt else prompt, ids]).astype("int32")
            for prompt, ids in zip(prompts, new, strict=True)
        ]
        if not as_text:
            return [row.tolist() for row in rows]
        results = [self._text(row, stop_ids) for row in rows]
        return results[0] if single else results

    def _generate_padded(
        self,
        inputs: Any,
        max_length: int | None,
        max_new_tokens: int | None,
        stop_ids: tuple[int, ...],
        strip_prompt: bool,
        seed: int | None,
    ) -> dict[str, np.ndarray]:
        """Ids in `[B, S]`, as `generate_preprocess` gives them, and the same shape back."""
        missing = {"token_ids", "padding_mask"} - set(inputs)
        if missing:
            raise ValueError(
                'A dict of inputs must hold "token_ids" and "padding_mask", both [batch, tokens]. '
                f"Missing: {sorted(missing)}. Received keys: {sorted(inputs)}"
            )
        size = self.backbone.config.vocabulary_size
        token_ids = to_ids("token_ids", inputs["token_ids"], 2, size)
        mask = to_numpy(inputs["padding_mask"]).astype("bool")
        if token_ids.shape != mask.shape:
            raise ValueError(
                '"token_ids" and "padding_mask" must both be [batch, tokens]. Received: '
                f"{token_ids.shape} and {mask.shape}"
            )
        lengths = mask.sum(1)
        if (mask != (np.arange(mask.shape[1]) < lengths[:, None])).any():
            raise ValueError(
                '"padding_mask" must be true from the start of each row to the end of its prompt: '
                "put padding behind the prompt."
            )
        prompts = [row[:length] for row, length in zip(token_ids, lengths, strict=True)]
        end = min(mask.shape[1], max_length or mask.shape[1])
        full = [i for i, length in enumerate(lengths) if length >= end]
        if full:
            raise ValueError(
                f"Rows {full} have no room to generate: pad them to the length that is wanted, "
                f"prompt included, and let no `max_length` be shorter. Received: {end} tokens"
            )
        most = max_new_tokens or end
        room = [min(int(end - length), most) for length in lengths]
        new = self._generate_ids(prompts, room, stop_ids, seed)
        token_ids, mask = np.zeros_like(token_ids), np.zeros_like(mask)
        for i, (prompt, ids) in enumerate(zip(prompts, new, strict=True)):
            row = ids if strip_prompt else np.concatenate([prompt, ids])
            token_ids[i, : len(row)] = row
            mask[i, : len(row)] = True
        return {"token_ids": token_ids, "padding_mask": mask}

    def _generate_ids(
        self, prompts: list[np.ndarray], room: list[int], stop_ids: tuple[int, ...], seed: Any
    ) -> list[np.ndarray]:
        # Its programs outlive `compile`: another sampler of the same kind compiles nothing.
        if self._generator is None or self._generator.eager != self.run_eagerly:
            self._generator = Generator(self.backbone, eager=self.run_eagerly)
        return self._generator.generate(prompts, room, self.sampler, stop_ids, seed)

    def _text(self, ids: np.ndarray, stop_ids: tuple[int, ...]) -> str:
        """The text of a row, without the token that stopped it."""
        if len(ids) and ids[-1] in stop_ids:
            ids = ids[:-1]
        mask = np.ones_like(ids, "bool")
        return self.preprocessor.generate_postprocess({"token_ids": ids, "padding_mask": mask})

    def _stop_ids(self, stop_token_ids: Any) -> tuple[int, ...]:
        if stop_token_ids is None:
            return ()
        if isinstance(stop_token_ids, str):
            if stop_token_ids != "auto":
                raise ValueError(
                    "`stop_token_ids` must be 'auto', None, or token ids. "
                    f"Received: stop_token_ids={stop_token_ids!r}"
                )
            self._require_preprocessor("`stop_token_ids` (None to generate to the end)")
            return tuple(self.preprocessor.tokenizer.stop_token_ids)
        size = self.backbone.config.vocabulary_size
        stops = [stop_token_ids] if np.ndim(stop_token_ids) == 0 else list(stop_token_ids)
        return tuple(to_ids("stop_token_ids", stops, 1, size).tolist())

    def _require_preprocessor(self, otherwise: str = "token ids") -> None:
        if self.preprocessor is None:
            raise ValueError(
                f"This model has no preprocessor: give {otherwise}, or make it with "
                "`GemmaCausalLM(backbone, preprocessor)`."
            )

    def score(
        self,
        token_ids: Any,
        padding_mask: Any = None,
        scoring_mode: str = "logits",
        layer_intercept_fn: Intercept | None = None,
        target_ids: Any = None,
    ) -> Any:
        """What the model predicts at every position of texts that are there already.

        Args:
            token_ids: int `[B, T]`.
            padding_mask: `[B, T]`, false or 0 at padding; by default there is none.
            scoring_mode: `"logits"` or `"loss"`.
            layer_intercept_fn: `(activations [B, T, D], layer) -> activations`, called with the
                embeddings, not yet scaled, at layer -1 and with the output of each block from 0
                on; what it returns goes on.
            target_ids: int `[B, T]`, the ids to be predicted; needed for `"loss"`.

        Returns:
            Logits, float32 `[B, T, V]`, final soft cap included; or losses in nats, `[B, T]`.

        Raises:
            ValueError: an unknown mode, no targets for a loss, ids out of range, a hook that
                returns another shape.
        """
        return score(
            self.backbone, token_ids, padding_mask, scoring_mode, layer_intercept_fn, target_ids
        )

    def save_to_hugging_face(
        self, directory: str | Path, max_shard_size: int | str = "5GB"
    ) -> None:
        """Write a folder that transformers loads: configuration, tokenizer, safetensors.

        The files are written beside the folder and moved in when all are whole.

        Args:
            directory: the folder; it is made, or the model in it replaced.
            max_shard_size: the size of a weights file, in bytes or as `"5GB"`.

        Raises:
            ValueError: no architecture of transformers computes this model, or the folder cannot
                be replaced.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.save_to_hugging_face("my_gemma")  # AutoModelForCausalLM.from_pretrained("my_gemma")
        ```
        """
        save_to_hugging_face(self, directory, max_shard_size)

    def save_to_gguf(self, path: str | Path, dtype: str = "bf16") -> None:
        """Write one file that llama.cpp loads: hyperparameters, vocabulary and weights.

        Needs the package `gguf`: `pip install "keras-gemma[gguf]"`.

        Args:
            path: the file, ending in `.gguf`; it is replaced when the new one is whole.
            dtype: `"bf16"`, `"f16"`, `"q8_0"` or `"q4_0"`.

        Raises:
            ValueError: llama.cpp has no architecture that computes this model, or there is no
                vocabulary.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.save_to_gguf("my_gemma.gguf", dtype="q8_0")
        ```
        """
        save_to_gguf(self, path, dtype)

    def quantize(self, mode: Any = None, **kwargs: Any) -> None:
        """Not available: raises a ValueError instead of leaving the weights as they are."""
        self.backbone.quantize(mode, **kwargs)

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
        lm.trainable = trainable
        return lm


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | np.integer) and value >= 1
