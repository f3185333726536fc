"""The causal language model: tokenizer, backbone, language-model head and sampler.

Everything below this module works on token ids; strings end here.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np

from keras_gemma import export, tf_data
from keras_gemma.backend import keras_internals
from keras_gemma.causal_lm.chat import Chat
from keras_gemma.causal_lm.custom_steps import (
    build_cache,
    call_with_cache,
    generate_step,
    generate_with_steps,
    is_overridden,
    quantization_layer_structure,
)
from keras_gemma.causal_lm.draft import read_draft
from keras_gemma.causal_lm.prompts import Prompts, read_prompt, read_prompts
from keras_gemma.causal_lm.settings import GenerationSettings, read_settings
from keras_gemma.causal_lm.text_request import TextRequest
from keras_gemma.causal_lm.training import TrainableTextModel
from keras_gemma.generation import samplers
from keras_gemma.generation.engine import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_QUEUED_REQUESTS,
    Engine,
)
from keras_gemma.generation.generate import prefill
from keras_gemma.generation.programs import Programs
from keras_gemma.generation.request import PrefixCache
from keras_gemma.lora.adapters import DEFAULT_NAME, Adapters
from keras_gemma.model.backbone import GemmaBackbone, check_layer_arguments
from keras_gemma.model.quantize import quantize, read_mode
from keras_gemma.presettable import Presettable
from keras_gemma.scoring.continuations import (
    ContinuationScore,
    ContinuationScorer,
    choose,
    score_continuations,
)
from keras_gemma.scoring.hooks import Hook, Intercept, read_hooks
from keras_gemma.scoring.inputs import read_inputs
from keras_gemma.scoring.perplexity import perplexity
from keras_gemma.scoring.score import Scorer
from keras_gemma.storage.adapters import peft
from keras_gemma.storage.formats import save_as
from keras_gemma.storage.gguf.writer import save_to_gguf
from keras_gemma.text.batches import is_text
from keras_gemma.text.chat import Message
from keras_gemma.text.grammar import GrammarCompiler
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor, require_preprocessor
from keras_gemma.text.tokenizer import check_vocabulary_size


@keras.saving.register_keras_serializable(package="keras_gemma")
class GemmaCausalLM(Presettable, TrainableTextModel):
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
        compile: bool = True,
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
            check_vocabulary_size(preprocessor.tokenizer, backbone.config.vocabulary_size)
        logits = backbone.token_embedding(backbone(backbone.input), reverse=True)
        super().__init__(inputs=backbone.input, outputs=logits, **kwargs)
        backbone.wrapping_models.add(self)
        keras_internals.restore_quantize(self)
        self.dtype_policy = backbone.dtype_policy
        self.preprocessor = preprocessor
        self.sampler = samplers.get("greedy")
        self._programs: Programs | None = None
        self._grammar_compiler: GrammarCompiler | None = None
        self._scorer: Scorer | None = None
        self._continuation_scorer: ContinuationScorer | None = None
        self._generate_function: Any = None
        self.generation_settings = GenerationSettings()
        if compile:  # Usable at once: calling `compile` is only needed for other settings.
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
        self._generate_function = None
        if isinstance(loss, str) and loss == "auto":
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float32")
        if isinstance(weighted_metrics, str) and weighted_metrics == "auto":
            weighted_metrics = [keras.metrics.SparseCategoricalAccuracy(dtype="float32")]
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

    # Generation

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
                `frequency_penalty`, `presence_penalty`, `seed`, `stop`, `num_return_sequences`,
                `logits_processors`, `response_format`, `return_logprobs`, `sampler`.

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
        settings = {"max_length": max_length, "stop_token_ids": stop_token_ids, **settings}
        call_settings = read_settings(settings, "generate").with_defaults(self.generation_settings)
        draft = read_draft(draft, num_draft_tokens)
        self.make_generate_function()
        decode = partial(generate_with_steps, self) if self.overrides_steps else None
        if tf_data.is_dataset(inputs):
            requests = (
                TextRequest(self, batch, call_settings, prefix, draft)
                for batch in inputs.as_numpy_iterator()
            )
            batches = [request.complete(strip_prompt, decode) for request in requests]
            if not batches:
                raise ValueError("The dataset of prompts is empty.")
            if isinstance(batches[0], dict):
                return {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
            return [row for batch in batches for row in ([batch] if is_text(batch) else batch)]
        request = TextRequest(self, inputs, call_settings, prefix, draft)
        return request.complete(strip_prompt, decode)

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
            per sequence, which is empty if the sequence has no new text. The iterator is a
            generator, whose return value is a list with the finish reason of each sequence.

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
        settings = {"max_length": max_length, "stop_token_ids": stop_token_ids, **settings}
        call_settings = read_settings(settings, "stream").with_defaults(self.generation_settings)
        if call_settings.top_logprobs is not None:
            raise ValueError(
                "`stream` does not support `return_logprobs`: use `generate` with "
                f"`return_logprobs`. Received: return_logprobs={call_settings.return_logprobs!r}"
            )
        if self.overrides_steps:
            raise ValueError(
                "A model that overrides `generate_step`, `call_with_cache` or `build_cache` "
                "generates whole texts: call `generate` instead of `stream`."
            )
        draft = read_draft(draft, num_draft_tokens)
        return TextRequest(self, inputs, call_settings, prefix, draft).stream()

    @property
    def overrides_steps(self) -> bool:
        """True if a subclass or this object overrides a step of generation."""
        steps = ("generate_step", "call_with_cache", "build_cache")
        return any(is_overridden(self, GemmaCausalLM, step) for step in steps)

    def call_with_cache(
        self, token_ids: Any, cache: Any, cache_update_index: Any
    ) -> tuple[Any, Any, Any]:
        """Reads tokens after those in a KV cache, as in KerasHub, for custom decoding loops.

        Args:
            token_ids: int `[B, T]`, the tokens that follow the cached ones.
            cache: Keys and values, `[B, L, 2, S, K, H]`, zeros at first. S is the maximum length.
            cache_update_index: Position of the first of `token_ids`, the same in all rows.

        Returns:
            Logits, float32 `[B, T, V]`; hidden states after the final norm, `[B, T, D]`; and the
            updated cache.
        """
        return call_with_cache(self.backbone, token_ids, cache, cache_update_index)

    def build_cache(self, token_ids: Any) -> tuple[Any, Any]:
        """Reads `token_ids [B, T]` into a new cache for `call_with_cache`.

        Returns:
            Hidden states after the final norm, `[B, T, D]`, and the cache with T positions.
        """
        return build_cache(self, token_ids)

    _build_cache = build_cache  # the name in KerasHub

    def generate_step(self, inputs: dict[str, Any], stop_token_ids: Any = None) -> dict[str, Any]:
        """Generates for one batch of padded ids, as in KerasHub. `generate` calls an override.

        Same as `generate` for a dict, but stop tokens are disabled unless they are passed. Programs
        are compiled inside, so the method itself cannot be compiled.

        Args:
            inputs: `{"token_ids", "padding_mask"}`, arrays `[B, S]`.
            stop_token_ids: Same as in `generate`.
        """
        steps = ("call_with_cache", "build_cache")
        if any(is_overridden(self, GemmaCausalLM, step) for step in steps):
            return generate_step(self, inputs, stop_token_ids)
        settings = read_settings({"stop_token_ids": stop_token_ids}, "generate")
        request = TextRequest(self, inputs, settings.with_defaults(self.generation_settings))
        return request.complete(False)

    @property
    def generate_function(self) -> Any:
        """Function that generates for one batch, as in KerasHub. `None` before the first call."""
        return self._generate_function

    @generate_function.setter
    def generate_function(self, value: None) -> None:
        if value is not None:
            raise ValueError(
                "`generate_function` cannot be replaced. Override `generate_step`, or pass "
                "`sampler` or `logits_processors` to `generate`. "
                f"Received: generate_function={value!r}"
            )
        self._generate_function = None

    def make_generate_function(self) -> Any:
        """Returns `generate_step`, as in KerasHub, and sets `generate_function` to it."""
        if self._generate_function is None:
            self._generate_function = self.generate_step
        return self._generate_function

    def get_quantization_layer_structure(self, mode: str) -> dict[str, Any] | None:
        """Returns the layers that Keras quantizes in the mode `"gptq"` or `"awq"`, as in KerasHub.

        Returns:
            A dict with a model of the embedding in `"pre_block_layers"` and the blocks in
            `"sequential_blocks"`; `None` for other modes.
        """
        return quantization_layer_structure(self, mode)

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
        return prefill(self.programs, ids)

    def engine(
        self,
        max_batch_size: int = DEFAULT_BATCH_SIZE,
        *,
        max_length: int | None = None,
        max_queued_requests: int = DEFAULT_QUEUED_REQUESTS,
        max_queued_tokens: int | None = None,
        prefix_cache_bytes: int | None = None,
        pinned: bool = False,
    ) -> Engine:
        """Returns an engine that decodes requests together, whenever they come.

        Args:
            max_batch_size, max_length, max_queued_requests, max_queued_tokens,
                prefix_cache_bytes, pinned: Same as in `Engine`.

        Raises:
            ValueError: If an argument is out of range, or the slots do not fit into memory.

        Example:

        ```python
        import keras_gemma
        from keras_gemma.generation.engine_request import EngineRequest

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        engine = lm.engine(max_batch_size=4)
        prompts = lm.preprocessor.tokenize_prompts(["ROMEO:", "JULIET:"])
        handles = [engine.add_request(EngineRequest(ids, max_new_tokens=8)) for ids in prompts]
        while engine.has_work:
            engine.step()
        print([handle.result()[0].ids for handle in handles])
        ```
        """
        return Engine(
            self.programs,
            max_batch_size,
            max_length,
            max_queued_requests,
            max_queued_tokens,
            prefix_cache_bytes,
            pinned,
        )

    @property
    def programs(self) -> Programs:
        """Compiled generation programs. `compile` keeps them, because most samplers share them."""
        if self._programs is None or self._programs.eager != self.run_eagerly:
            self._programs = Programs(self.backbone, eager=self.run_eagerly)
        return self._programs

    @property
    def grammar_compiler(self) -> GrammarCompiler:
        """Compiler of response formats for the vocabulary of the preprocessor."""
        tokenizer = self.preprocessor.tokenizer
        if self._grammar_compiler is None or self._grammar_compiler.pieces is not tokenizer.pieces:
            size = self.backbone.config.vocabulary_size
            self._grammar_compiler = GrammarCompiler(tokenizer, size)
        return self._grammar_compiler

    # Chat

    def chat(
        self,
        system: str | None = None,
        context_full: Literal["error", "drop_oldest"] = "error",
        *,
        history: Sequence[Message] = (),
        draft: Any = None,
        num_draft_tokens: int | None = None,
        **settings: Any,
    ) -> Chat:
        """Starts a chat whose turns reuse the KV cache of the previous turns.

        Models without instruction tuning simply continue the text of the conversation.

        Args:
            system: System message. It is prepended to the first user turn, because Gemma has no
                system role.
            context_full: Action when the context is too full for another reply. `"error"` raises
                an error. `"drop_oldest"` warns and drops the oldest turns until a quarter of the
                context is free; the system message is kept.
            history: Previous messages, as dicts `{"role", "content"}`.
            draft, num_draft_tokens: Same as in `generate`.
            **settings: `GenerationSettings` for all turns. The length of a reply is limited by
                `max_new_tokens` and by the context length.

        Raises:
            ValueError: If roles do not alternate, a setting is out of range, or the model has no
                preprocessor.
            TypeError: If a message is malformed or a setting is unknown.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        chat = lm.chat(max_new_tokens=20)
        print(chat.send("Who's there?"))
        print(chat.history)
        ```
        """
        require_preprocessor(self.preprocessor, "a chat", None)
        draft = read_draft(draft, num_draft_tokens)
        return Chat(self, system, history, context_full, draft, settings)

    def generate_chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        max_length: int | None = None,
        stop_token_ids: Any = "auto",
        *,
        prefix: PrefixCache | None = None,
        draft: Any = None,
        num_draft_tokens: int | None = None,
        **settings: Any,
    ) -> Any:
        """Generates the reply to a conversation, or to each conversation of a batch.

        Args:
            messages: A list of dicts `{"role", "content"}`, as for
                `GemmaTokenizer.apply_chat_template`, or a list of such lists.
            max_length, stop_token_ids, prefix, draft, num_draft_tokens, **settings: Same as in
                `generate`.

        Returns:
            The reply as a string; for a batch, a list of replies. If `num_return_sequences` is
            above 1, each conversation gets a list. With `return_logprobs`, each reply is a
            `Completion`.

        Raises:
            ValueError, TypeError: Same as in `apply_chat_template` and `generate`.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        messages = [{"role": "user", "content": "Who's there?"}]
        lm.generate_chat(messages, max_new_tokens=20)
        lm.generate_chat([messages, messages], max_new_tokens=20, temperature=0.8, seed=1)
        ```
        """
        require_preprocessor(self.preprocessor, "`generate_chat`", "Pass token ids to `generate`")
        settings = {"max_length": max_length, "stop_token_ids": stop_token_ids, **settings}
        call_settings = read_settings(settings, "generate_chat").with_defaults(
            self.generation_settings
        )
        ids = self.preprocessor.tokenizer.apply_chat_template(messages)
        single = isinstance(ids[0], int)
        rows = [np.array(row, "int32") for row in ([ids] if single else ids)]
        prompts = Prompts(rows, texts=True, single=single)
        draft = read_draft(draft, num_draft_tokens)
        decode = partial(generate_with_steps, self) if self.overrides_steps else None
        request = TextRequest(self, prompts, call_settings, prefix, draft)
        return request.complete(strip_prompt=True, decode=decode)

    # Scoring

    def score(
        self,
        token_ids: Any,
        padding_mask: Any = None,
        scoring_mode: str = "logits",
        layer_intercept_fn: Intercept | None = None,
        target_ids: Any = None,
        *,
        hooks: Mapping[str, Hook] | None = None,
    ) -> Any:
        """Returns the logits or losses of existing texts at every position.

        Without hooks the forward pass is compiled; on PyTorch no gradient passes through it. With
        hooks it runs eagerly, and gradients with respect to the embeddings and all later
        activations are available, for quantized models too. Weights are constants here; train
        them with `fit`.

        Args:
            token_ids: Token ids, int `[B, T]`: a NumPy array, a tensor or nested lists. Or a
                string, or a list of strings, which are padded on the right.
            padding_mask: `[B, T]`, False or 0 at padding, which may be on the left or right.
                `None` means no padding.
            scoring_mode: `"logits"` or `"loss"`. The loss is computed in chunks, so the logits of
                all positions are never in memory at once, not even for a gradient.
            layer_intercept_fn: Function `(activations [B, T, D], layer) -> activations`. Called
                with the embeddings before scaling (layer -1) and the output of each block (layers
                from 0). Its result replaces the activations.
            target_ids: Ids to predict, int `[B, T]`; required for `"loss"`. For strings these are
                the next tokens, and positions without a next token have a loss of 0.
            hooks: Dict from names or patterns of hook points to functions `(activations, name) ->
                activations`, such as `{"block.*.attention.weights": record}`. The result of a
                function replaces the activations. The names are listed in
                `keras_gemma.scoring.hooks`.

        Returns:
            Logits after the final soft cap, float32 `[B, T, V]`; or losses in nats, `[B, T]`.

        Raises:
            ValueError: If the mode is unknown, targets are missing, ids are out of range, a text
                is longer than the context, a pattern matches no hook point, or a hook changes the
                shape or dtype.
            TypeError: If `hooks` is not a dict from names to functions of two arguments.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        losses = lm.score("To be, or not to be", scoring_mode="loss")
        without = lm.score(
            "To be, or not to be",
            scoring_mode="loss",
            hooks={"block.[01].attention.output": lambda x, name: 0 * x},
        )
        ```
        """
        if self._scorer is None:
            self._scorer = Scorer(self.backbone)
        config = self.backbone.config
        active_hooks = read_hooks(hooks, layer_intercept_fn, config.num_layers)
        inputs = read_inputs(token_ids, padding_mask, target_ids, self.preprocessor, config)
        return self._scorer.score(inputs, active_hooks, scoring_mode)

    def perplexity(
        self, texts: Any, stride: int | None = None, window: int | None = None
    ) -> float | np.ndarray:
        """Returns the perplexity of texts: e to the mean loss of a token.

        Texts longer than `window` are read in windows that start `stride` tokens apart. Every
        token counts once, given all tokens before it in its window.

        Args:
            texts: A string, or a list of strings or of lists of token ids.
            stride: Distance between the starts of two windows, in tokens. Half a window by
                default.
            window: Window length, in tokens. The model's context length by default.

        Returns:
            A float for one string, a float64 array `[B]` for a list.

        Raises:
            ValueError: If a text has fewer than two tokens, `window` exceeds the context length,
                or `stride` is not smaller than `window`.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.perplexity(["To be, or not to be", "be be not To or, to"], stride=64, window=128)
        ```
        """
        return perplexity(self, texts, stride, window)

    def choose(self, prompt: Any, choices: Any) -> np.ndarray:
        """Returns the log-probability of each choice as the continuation of a prompt.

        The prompt is read once for all choices. Divide by the number of tokens or characters of
        each choice if long choices should not be less likely than short ones.

        Args:
            prompt: A string, or a list of token ids.
            choices: List of C strings, or of lists of token ids. A choice that is a word usually
                begins with a space.

        Returns:
            Sums of the log-probabilities of the tokens of each choice, float64 `[C]`, in nats.

        Raises:
            ValueError: If `choices` is empty, a choice has no token, or the prompt and a choice are
                longer than the context.
            TypeError: If `choices` is not a list.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        choices = [" be", " bees", " sleep"]
        log_probabilities = lm.choose("To be, or not to", choices)
        print(choices[log_probabilities.argmax()])
        ```
        """
        return choose(self, prompt, choices)

    def score_continuations(self, prompts: Any, continuations: Any) -> list[ContinuationScore]:
        """Returns the log-probabilities of continuations, each after its own prompt.

        Each prompt is read once for all of its continuations, and the beginning that prompts share
        is read once for all of them, whatever their order. The logits are computed only at tokens
        of continuations.

        Args:
            prompts: List of B strings, or of lists of token ids.
            continuations: List of B strings, or of lists of token ids.

        Returns:
            List of B `ContinuationScore`: `log_probability`, in nats, `is_greedy` and
            `num_tokens`.

        Raises:
            ValueError: If the lists differ in length, a continuation has no token, or a prompt
                and its continuation are longer than the context.
            TypeError: If an argument is not a list.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        prompts = ["To be, or not to", "To be, or not to", "ROMEO"]
        for score in lm.score_continuations(prompts, [" be", " sleep", ":"]):
            print(score.log_probability / score.num_tokens, score.is_greedy)
        ```
        """
        return score_continuations(self, prompts, continuations)

    @property
    def continuation_scorer(self) -> ContinuationScorer:
        """Scorer of continuations, with its compiled programs."""
        if self._continuation_scorer is None:
            self._continuation_scorer = ContinuationScorer(self.backbone)
        return self._continuation_scorer

    # LoRA

    def enable_lora(
        self,
        rank: int = 8,
        targets: str | Iterable[str] | None = None,
        alpha: float | None = None,
        dropout: float = 0.0,
        *,
        name: str = DEFAULT_NAME,
        use_rslora: bool = False,
        dtype: str = "float32",
        seed: int | None = None,
        target_layer_names: str | Iterable[str] | None = None,
    ) -> None:
        """Freezes the base model and adds a trainable LoRA adapter.

        The adapter adds `alpha / rank * B A` to each target matrix W, quantized or not. B is
        initialized to zero, so the output does not change until `fit` trains A and B. Call
        `enable_lora` again with another `name` to add another adapter. One adapter is active at a
        time.

        While an adapter is active, `save_to_preset`, `save_to_hugging_face`, `save_to_gguf` and
        `save_to_orbax` write the merged model. `save_lora` writes only the adapter, and a `.keras`
        file stores the base model and its adapters separately.

        Args:
            rank: Rank of the update: rows of A and columns of B. Defaults to 8.
            targets: Matrices to adapt: kinds (`"query"`, `"key"`, `"value"`, `"output"`, `"gate"`,
                `"up"`, `"down"`), their PEFT names such as `"q_proj"`, name patterns such as
                `"layers.[0-3].*"`, or `"all-linear"`. Defaults to `("query", "value")`.
            alpha: Scale of the update, divided by `rank`. Defaults to 16.
            dropout: Dropout rate of the input of A in training. Defaults to 0.
            name: Adapter name. Defaults to `"default"`.
            use_rslora: If True, scales by `alpha / sqrt(rank)`, which suits large ranks.
            dtype: Dtype of A and B. Products use the model's compute dtype. Defaults to
                `"float32"`, which training needs.
            seed: Random seed for A. `None` uses the seed of `keras.utils.set_random_seed`.
            target_layer_names: KerasHub's name of `targets`.

        Raises:
            ValueError: If the name is already in use, a number is out of range, a target is
                unknown or is the embedding, or an adapter is merged.

        Example:

        ```python
        import keras
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en", quantization="int4")
        lm.enable_lora(rank=8, targets="all-linear")
        lm.compile(optimizer=keras.optimizers.AdamW(1e-4))
        lm.fit(["First Citizen:\\nSpeak, speak."], batch_size=1)
        lm.save_lora("my_adapter")
        ```
        """
        self.backbone.enable_lora(
            rank,
            targets,
            16 if alpha is None else alpha,
            dropout,
            name=name,
            use_rslora=use_rslora,
            dtype=dtype,
            seed=seed,
            target_layer_names=target_layer_names,
        )

    @property
    def lora_adapters(self) -> list[str]:
        """Names of all adapters."""
        return self.backbone.lora_adapters

    @property
    def active_adapter(self) -> str | None:
        """Name of the active adapter, merged or not, or `None`."""
        return self.backbone.active_adapter

    def set_adapter(self, name: str | None) -> None:
        """Activates an adapter. Loads and copies nothing.

        `fit` trains the active adapter. An optimizer that has trained another adapter is reset and
        keeps its settings.

        Args:
            name: One of `lora_adapters`. `None` deactivates all adapters.

        Raises:
            ValueError: If the name is unknown or an adapter is merged.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.enable_lora(rank=4, name="verse")
        lm.enable_lora(rank=4, name="prose")
        lm.set_adapter("verse")
        lm.set_adapter(None)
        ```
        """
        self.backbone.set_adapter(name)

    def delete_adapter(self, name: str) -> None:
        """Deletes an adapter.

        Deleting the last adapter makes the base model trainable again, as it was before.

        Args:
            name: One of `lora_adapters`.

        Raises:
            ValueError: If the name is unknown or an adapter is merged.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.enable_lora(rank=4)
        lm.delete_adapter("default")
        ```
        """
        self.backbone.delete_adapter(name)

    def merge_lora(self, keep_base: bool = True) -> None:
        """Merges the active adapter into the base model, which removes its runtime cost.

        Logits stay the same up to the rounding of the merged matrices. Saving does not need this
        method: the `save_to_*` methods merge the active adapter themselves.

        Args:
            keep_base: If True, keeps a copy of the changed matrices for `unmerge_lora`. If False,
                the merge is permanent and all adapters are deleted. Defaults to True.

        Raises:
            ValueError: If no adapter is active, an adapter is merged, the model is quantized, or
                the adapter contains NaN or infinity.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.enable_lora(rank=4)
        lm.merge_lora()
        lm.unmerge_lora()
        ```
        """
        self.backbone.merge_lora(keep_base)

    def unmerge_lora(self) -> None:
        """Restores the exact matrices from before `merge_lora`.

        Raises:
            ValueError: If no adapter is merged.
        """
        self.backbone.unmerge_lora()

    def save_lora(
        self,
        directory: str | Path,
        name: str | None = None,
        base_model: str | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        """Writes an adapter in PEFT's format: `adapter_config.json`, `adapter_model.safetensors`.

        PEFT loads the adapter onto the base model. To write the base model, call
        `set_adapter(None)` and then `save_to_hugging_face`.

        Args:
            directory: The folder, which is created.
            name: Name of the adapter. Defaults to the active adapter.
            base_model: Base model to record for PEFT, such as `"google/gemma-2-2b"`. Defaults to
                the preset that the model was loaded from.
            overwrite: If True, replaces an adapter in `directory`. Other folders are never
                replaced.

        Raises:
            ValueError: If the adapter is unknown, it contains NaN or infinity, or the folder
                exists or cannot be written.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.enable_lora(rank=4)
        lm.save_lora("my_adapter")
        lm.delete_adapter("default")
        lm.load_lora("my_adapter")
        ```
        """
        peft.save_lora(self.backbone, directory, name, base_model, overwrite)

    def load_lora(
        self, directory: str | Path, name: str = DEFAULT_NAME, dtype: str = "float32"
    ) -> None:
        """Loads an adapter that `save_lora` or PEFT wrote, and activates it.

        Args:
            directory: The folder with the adapter's two files.
            name: Name of the adapter in this model.
            dtype: Dtype of the adapter's variables.

        Raises:
            FileNotFoundError: If the folder or a file in it is missing.
            ValueError: If the name is taken, the adapter does not fit the model (all such tensors
                are listed), it contains NaN or infinity, or it is of an unsupported kind (DoRA,
                biases, whole modules).

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.enable_lora(rank=4)
        lm.save_lora("my_adapter")
        lm.load_lora("my_adapter", name="again")
        ```
        """
        peft.load_lora(self.backbone, directory, name, dtype)

    # Quantization and other formats

    def quantize(
        self,
        mode: Any = None,
        group_size: int = 32,
        zero_points: bool = False,
        embedding: str = "int8",
        *,
        config: Any = None,
        calibration: Any = None,
        zeros: bool | None = None,
    ) -> None:
        """Quantizes the matrices to 8 or 4 bits in place, one at a time to save memory.

        Generation, scoring and saved presets then use these weights. Matrices and norms are frozen,
        and an optimizer that trained them is reset. `from_preset(..., quantization=...)` quantizes
        while loading. If an error is raised, the model is unchanged.

        Args:
            mode: `"int8"` (one scale per row), `"int4"`, or a `QuantizationConfig` or its
                dictionary with all settings.
            group_size: Numbers of a row that share a scale (`"int4"` only).
            zero_points: If True, each group has a zero point (`"int4"` only).
            embedding: Mode of the embedding (`"int4"` only).
            config: A config of `keras.quantizers`, such as `keras.quantizers.GPTQConfig`, in place
                of `mode`. GPTQ and AWQ are replaced by int4 with calibration.
            calibration: Representative texts, or lists of token ids. Their activation statistics
                weight the quantization error per input channel. Texts are truncated to the
                context length.
            zeros: Earlier name of `zero_points`.

        Raises:
            ValueError: If the model is already quantized or in `fit`, the mode or settings are
                invalid, the group size does not divide the rows, weights are not finite, or
                calibration is empty or has strings without a preprocessor.
            TypeError: If `calibration` has another type.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.quantize("int4", calibration=["Before we proceed any further, hear me speak."])
        print(keras_gemma.quantization.report(lm))
        ```
        """
        config, texts = read_mode(mode, config, group_size, zero_points, embedding, zeros)
        calibration = texts if calibration is None else calibration
        rows = None
        if calibration is not None and self.backbone.quantization is None:
            calibration = [calibration] if is_text(calibration) else calibration
            size = self.backbone.config.vocabulary_size
            rows = read_prompts(calibration, self.preprocessor, size, "calibration").ids
        quantize(self.backbone, config, rows)

    def save_to_hugging_face(
        self,
        directory: str | Path,
        max_shard_size: int | str = "5GB",
        *,
        overwrite: bool = False,
    ) -> None:
        """Writes a folder that transformers loads: configuration, tokenizer, safetensors.

        The files are written next to the folder and moved into it when all are complete. Quantized
        weights are written dequantized, in the model's dtype.

        Args:
            directory: The folder, which is created.
            max_shard_size: Maximum size of a weights file, in bytes or as `"5GB"`.
            overwrite: If True, replaces the model in `directory`. Folders without a Gemma model
                are never replaced.

        Raises:
            ValueError: If no architecture of transformers computes this model, or the folder exists
                or cannot be written.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.save_to_hugging_face("my_gemma")  # AutoModelForCausalLM.from_pretrained("my_gemma")
        ```
        """
        save_as(self, "hugging_face", directory, max_shard_size, overwrite=overwrite)

    export_to_transformers = save_to_hugging_face  # the name in KerasHub

    def save_to_gguf(
        self, path: str | Path, dtype: str = "bf16", *, overwrite: bool = False
    ) -> None:
        """Writes one file that llama.cpp loads: hyperparameters, vocabulary and weights.

        Needs the package `gguf`, which the extra `gguf` installs. Quantized weights are
        dequantized and rounded to `dtype`.

        Args:
            path: The file, ending in `.gguf`.
            dtype: `"bf16"`, `"f16"`, `"q8_0"` or `"q4_0"`.
            overwrite: If True, replaces a GGUF file when the new one is complete.

        Raises:
            ValueError: If no architecture of llama.cpp computes this model, the model has no
                vocabulary, or the path exists.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.save_to_gguf("my_gemma.gguf", dtype="q8_0")
        ```
        """
        save_to_gguf(self, path, dtype, overwrite)

    def save_to_orbax(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Writes a folder that DeepMind's package `gemma` loads: `gm.ckpts.load_params(path)`.

        Needs the package `tensorstore`, which the extra `orbax` installs. The folder also gets
        config.json and tokenizer.model, which `from_preset` reads. Quantized weights are written
        dequantized, in the model's dtype.

        Args:
            path: The folder, which is created.
            overwrite: If True, replaces the model in `path`. Folders without a Gemma model are
                never replaced.

        Raises:
            ValueError: If DeepMind's package would compute this model differently, or the folder
                exists or cannot be written.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.save_to_orbax("my_gemma")
        ```
        """
        save_as(self, "orbax", path, argument="path", overwrite=overwrite)

    def export(
        self,
        filepath: str | Path,
        format: str = "tf_saved_model",
        *,
        overwrite: bool = False,
        **options: Any,
    ) -> None:
        """Exports the model to a folder that runs without Keras and without this package.

        A SavedModel maps strings to strings: its graph holds the tokenizer, the chat template,
        the KV cache, sampling and the decoding loop. Defaults for generation settings are taken
        from `compile()`. Exporting and running it need the packages tensorflow and
        tensorflow-text, which the extra `tensorflow` installs.

        A program of `"torch"`, `"jax"` or `"onnx"` maps token ids and a KV cache to logits and
        the updated cache. The caller writes the decoding loop, as in the folder
        `examples/exported`.

        If a format needs another backend than the current one, a subprocess exports the model.
        If the export fails, an existing export at `filepath` is unchanged.

        Args:
            filepath: Path of the folder. It appears only when the export is complete.
            format: `"tf_saved_model"`, `"torch"`, `"jax"` or `"onnx"`.
            overwrite: If True, replaces an existing export. Other files and folders are never
                replaced.
            **options: Options of the format. `"torch"` and `"onnx"` have none.

                `"tf_saved_model"`:

                - `max_new_tokens`: Default of the served model. The value passed to `compile()`
                  by default, or 256.
                - `max_batch_size`: Maximum number of texts in a call. No limit by default.
                - `quantization`: Same as in `from_preset`, but only for the export.

                `"jax"`:

                - `batch_size`: Batch size of every call. `None` allows any batch size. 1 by
                  default.

        Raises:
            ValueError: If the format is unknown, the path exists, the model has no preprocessor,
                an option is out of range, the format does not support a setting of `compile()`,
                or an active adapter is not merged.
            TypeError: If the format does not have an option.
            ImportError: If packages that the format needs are not installed.
            OSError: If the disk is too small.
            RuntimeError: If the subprocess failed.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.export("served_gemma", max_new_tokens=40)
        ```
        """
        self.adapters.check_exportable()
        export.export(self, filepath, format, overwrite, **options)

    # Keras serialization

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
