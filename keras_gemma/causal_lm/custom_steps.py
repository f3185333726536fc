"""KerasHub's steps of generation, for models that override them and for custom decoding loops.

    generate
      generate_step       padded ids of a batch -> ids with the new tokens
        build_cache       the ids of the prompts -> KV cache
        call_with_cache   the next tokens and the KV cache -> logits

`generate` calls them only if a subclass or an object overrides one: its own cache has fewer slots
in local layers, and its programs are compiled. The cache here has the layout of KerasHub,
`[B, L, 2, S, K, H]`: keys and values of each layer, by position.
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_gemma import backend
from keras_gemma.generation.request import Request, SequenceOutput
from keras_gemma.generation.samplers.loop import Prompt
from keras_gemma.generation.stopping import ends_with_stop_token
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.model.head import final_norm, to_logits
from keras_gemma.model.transformer import forward_with_cache
from keras_gemma.text.inputs import pad_rows


def call_with_cache(
    backbone: GemmaBackbone, token_ids: Any, cache: Any, cache_update_index: Any
) -> tuple[Any, Any, Any]:
    """Implements `GemmaCausalLM.call_with_cache`."""
    config, weights = backbone.config, backbone.tensors()
    token_ids = ops.convert_to_tensor(token_ids, dtype="int32")
    index = ops.cast(cache_update_index, "int32")
    positions = index + ops.arange(token_ids.shape[1], dtype="int32")[None]
    positions = ops.broadcast_to(positions, ops.shape(token_ids))
    # Copies, because PyTorch writes into the cache in place.
    layers = [
        tuple(ops.copy(cache[:, i, part]) for part in (0, 1)) for i in range(config.num_layers)
    ]
    x, layers = forward_with_cache(weights, token_ids, positions, layers, config)
    hidden_states = final_norm(x, weights["head"], config)
    logits = to_logits(
        hidden_states, weights["head"]["token_embedding"], config.final_logit_soft_cap
    )
    cache = ops.stack([ops.stack(pair, axis=1) for pair in layers], axis=1)
    return logits, hidden_states, cache


def build_cache(lm: Any, token_ids: Any) -> tuple[Any, Any]:
    """Implements `GemmaCausalLM.build_cache`."""
    config = lm.backbone.config
    token_ids = ops.convert_to_tensor(token_ids, dtype="int32")
    batch, length = token_ids.shape
    shape = batch, config.num_layers, 2, length, config.num_key_value_heads, config.head_dim
    cache = ops.zeros(shape, dtype=lm.backbone.compute_dtype)
    _, hidden_states, cache = lm.call_with_cache(token_ids, cache, 0)
    return hidden_states, cache


def is_overridden(lm: Any, base: type, name: str) -> bool:
    """Returns True if the method `name` of `lm` is not that of `base`."""
    return getattr(getattr(lm, name), "__func__", None) is not vars(base)[name]


def generate_step(
    lm: Any, inputs: dict[str, Any], stop_token_ids: Sequence[int] | None
) -> dict[str, Any]:
    """Implements `GemmaCausalLM.generate_step` for models that override `call_with_cache`."""
    token_ids = ops.convert_to_tensor(inputs["token_ids"], dtype="int32")
    mask = ops.cast(inputs["padding_mask"], "bool")
    hidden_states, cache = lm.build_cache(token_ids)

    def next_logits(tokens: Any, cache: Any, index: Any) -> tuple[Any, Any, Any]:
        token = ops.take(tokens, index - 1, axis=1)[:, None]
        logits, hidden_states, cache = lm.call_with_cache(token, cache, index - 1)
        return logits[:, 0], hidden_states[:, 0], cache

    index = ops.min(ops.sum(ops.cast(mask, "int32"), axis=-1))
    new = lm.sampler(
        next=next_logits,
        prompt=token_ids,
        cache=cache,
        index=index,
        mask=mask,
        stop_token_ids=stop_token_ids,
        hidden_states=hidden_states,
        model=lm,
    )
    is_stop = ops.cast(Prompt(token_ids, mask, stop_token_ids).is_new_stop(new), "int32")
    stops_before = ops.cumsum(is_stop, axis=-1) - is_stop
    return {"token_ids": new, "padding_mask": stops_before == 0}


def generate_with_steps(lm: Any, request: Request) -> list[SequenceOutput]:
    """Generates with `lm.generate_step`. Returns the output of each prompt.

    Raises:
        ValueError: If the request has a setting that the step does not know.
    """
    known = Request(request.prompts, request.max_new_tokens, lm.sampler, request.stop_token_ids)
    names = ("sampler", "seed", "num_return_sequences", "repetition_penalty", "frequency_penalty")
    others = ("presence_penalty", "logits_processors", "top_logprobs", "prefix", "draft")
    for name in (*names, *others):
        if getattr(request, name) != getattr(known, name):
            raise ValueError(
                "A model that overrides `generate_step` or `call_with_cache` generates with its "
                f"own sampler and no other settings. Received: {name}={getattr(request, name)!r}"
            )
    request.check(lm.backbone.config)
    token_ids, mask = pad_rows(request.prompts, request.max_text_length(), pad_id=0)
    stop_token_ids = request.stop_token_ids or None
    inputs = {"token_ids": backend.to_tensor(token_ids), "padding_mask": backend.to_tensor(mask)}
    result = lm.generate_step(inputs, stop_token_ids=stop_token_ids)
    token_ids, mask = (ops.convert_to_numpy(result[name]) for name in inputs)
    outputs = []
    for prompt, count, ids, kept in zip(
        request.prompts, request.max_new_tokens, token_ids, mask, strict=True
    ):
        new = slice(len(prompt), len(prompt) + count)
        new_ids = ids[new][kept[new]]
        stopped = ends_with_stop_token(new_ids, request.stop_token_ids)
        outputs.append(SequenceOutput(new_ids, stopped))
    return outputs


def quantization_layer_structure(lm: Any, mode: str) -> dict[str, Any] | None:
    """Implements `GemmaCausalLM.get_quantization_layer_structure`."""
    if mode not in ("gptq", "awq"):
        return None
    blocks = lm.backbone.transformer_layers
    embedding = keras.Model(lm.backbone.input, blocks[0].input[0])
    return {"pre_block_layers": [embedding], "sequential_blocks": blocks}
