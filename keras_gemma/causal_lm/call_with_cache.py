"""Forward pass with the KV cache in KerasHub's layout, for custom decoding loops.

    cache   [B, L, 2, S, K, H]   keys and values of each layer, by position

`generate` does not use it: its own cache has fewer slots in local layers.
"""

from typing import Any

from keras import ops

from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.model.head import final_norm, to_logits
from keras_gemma.model.transformer import forward_with_cache


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
