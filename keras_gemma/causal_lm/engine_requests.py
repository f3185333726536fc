"""Requests to the engine from the prompts and settings that `generate` takes."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_gemma.causal_lm.prompts import Prompts, read_prompts
from keras_gemma.causal_lm.settings import GenerationSettings
from keras_gemma.causal_lm.text_request import TextRequest
from keras_gemma.generation.engine_request import EngineRequest
from keras_gemma.generation.samplers.random import FILTERS


def engine_request(lm: Any, prompt: Any, settings: GenerationSettings) -> EngineRequest:
    """Returns the request that continues a prompt as `generate` does.

    Args:
        lm: A `GemmaCausalLM` with a preprocessor.
        prompt: A string, a list of token ids, or a list of messages `{"role", "content"}`.
        settings: Settings of the call, filled up with those of `compile`.

    Raises:
        ValueError, TypeError: If the prompt or a setting is invalid, or the engine does not support
            the setting.
    """
    request = TextRequest(lm, _read(lm, prompt), settings).token_request
    sampler = request.sampler
    if not sampler.has_known_probabilities:
        raise ValueError(
            "The engine needs a sampler of 'greedy', 'random', 'top_k', 'top_p' and 'min_p'. "
            f"Received: sampler={type(sampler).__name__}"
        )
    if request.logits_processors:
        raise ValueError(
            "The engine does not support `logits_processors`, which see the whole batch. Call "
            "`generate` with them."
        )
    if request.top_logprobs is not None:
        raise ValueError(
            "Batches of prompts do not return log-probabilities. Leave out "
            f"`return_logprobs`, or call `generate`. Received: {settings.return_logprobs!r}"
        )
    own = {name: np.ravel(value)[0].item() for name, value in sampler.settings().items()}
    seed = sampler.seed if request.seed is None else request.seed

    def penalty(name: str, default: float) -> float:
        value = getattr(request, name)
        return default if value is None else float(np.ravel(value)[0])

    return EngineRequest(
        prompt=request.prompts[0],
        max_new_tokens=request.max_new_tokens[0],
        temperature=0.0 if sampler.is_greedy else own["temperature"],
        **{name: own.get(name) for name in FILTERS},
        seed=None if seed is None else int(np.ravel(np.array(seed, object))[0]),
        num_return_sequences=request.num_return_sequences,
        stop_token_ids=request.stop_token_ids,
        repetition_penalty=penalty("repetition_penalty", 1.0),
        frequency_penalty=penalty("frequency_penalty", 0.0),
        presence_penalty=penalty("presence_penalty", 0.0),
        constraint=request.constraint,
    )


def _read(lm: Any, prompt: Any) -> Prompts:
    is_conversation = (
        isinstance(prompt, list | tuple)
        and bool(prompt)
        and all(isinstance(message, Mapping) for message in prompt)
    )
    if is_conversation:
        ids = lm.preprocessor.tokenizer.apply_chat_template(prompt)
        return Prompts([np.array(ids, "int32")], texts=True, single=True)
    rows = prompt if isinstance(prompt, str) else [prompt]
    return read_prompts(rows, lm.preprocessor, lm.backbone.config.vocabulary_size, "prompt")
