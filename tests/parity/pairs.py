"""The same random model in this package and in transformers.

The names of transformers' tensors are repeated here instead of imported from
`keras_gemma.storage`, so that a mistake there does not cancel out.
"""

import os
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from keras import ops

from keras_gemma.config import GemmaConfig
from keras_gemma.model.backbone import GemmaBackbone

if TYPE_CHECKING:
    import transformers

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

IDS = np.array(
    [
        [2, 9, 31, 8, 300, 77, 5, 140, 11, 12, 250, 17],
        [2, 400, 3, 17, 17, 60, 211, 4, 90, 1, 33, 508],
    ]
)
"""Token ids, three times as long as the window of `tests.configurations`."""

FULL = np.ones_like(IDS)
PADDED = FULL.copy()
"""Padding mask with 7 tokens in the second row. The ids of its padding are not zero."""
PADDED[1, 7:] = 0

TOLERANCE = 1e-4
"""Tolerance of float32 results, relative to the largest value."""

STANDARD_DEVIATION = 0.4
"""Standard deviation of all weights. Attention logits are about 5, above the soft cap of 2."""


def random_weights(config: GemmaConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns all weights, including norms, in float32 that bfloat16 represents exactly."""
    random = np.random.default_rng(seed)
    return {
        name: random.normal(0.0, STANDARD_DEVIATION, shape)
        .astype(ml_dtypes.bfloat16)
        .astype("float32")
        for name, shape in config.weight_shapes().items()
    }


def tensor_name(name: str, config: GemmaConfig) -> str:
    """Returns the name of a weight in transformers."""
    if name == "token_embedding":
        return "model.embed_tokens.weight"
    if name == "final_norm":
        return "model.norm.weight"
    _, layer, part = name.split(".")
    # Only Gemma 1 names the norm before the feed forward after the attention.
    gemma1 = not config.use_post_ffw_norm and not config.use_sliding_window_attention
    tensor = {
        "pre_attention_norm": "input_layernorm",
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "query_norm": "self_attn.q_norm",
        "key_norm": "self_attn.k_norm",
        "output": "self_attn.o_proj",
        "post_attention_norm": "post_attention_layernorm",
        "pre_ffw_norm": "post_attention_layernorm" if gemma1 else "pre_feedforward_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
        "post_ffw_norm": "post_feedforward_layernorm",
    }[part]
    return f"model.layers.{layer}.{tensor}.weight"


def transformers_sizes(config: GemmaConfig) -> dict[str, Any]:
    """Returns the arguments of all of transformers' configs for Gemma."""
    return {
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.hidden_dim,
        "intermediate_size": config.feed_forward_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_query_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.layer_norm_epsilon,
        "max_position_embeddings": config.context_length,
        "attn_implementation": "eager",
    }


def load_into_transformers(
    model: "transformers.PreTrainedModel", arrays: dict[str, np.ndarray], config: GemmaConfig
) -> None:
    """Assigns all weights, by their names in `config.weight_shapes()`, to a transformers model."""
    import torch

    tensors = {
        tensor_name(name, config): torch.from_numpy(np.array(array))
        for name, array in arrays.items()
    }
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}  # tied


def make_theirs(
    configuration: dict[str, Any], seed: int = 0, **changes: Any
) -> "transformers.PreTrainedModel":
    """Returns a transformers model with `random_weights` and `changes` to its config."""
    import transformers

    config = GemmaConfig(**configuration)
    values = transformers_sizes(config)
    if config.use_sliding_window_attention:
        scalar = config.head_dim
        if not config.query_head_dim_normalize:
            scalar = config.hidden_dim // config.num_query_heads
        values |= {
            "query_pre_attn_scalar": scalar,
            "sliding_window": config.sliding_window_size,
            "attn_logit_softcapping": config.attention_logit_soft_cap,
            "final_logit_softcapping": config.final_logit_soft_cap,
        }
        family = "Gemma2" if config.use_post_ffw_norm else "VaultGemma"
        if config.use_query_key_norm:
            family = "Gemma3"
            kinds = [
                "full_attention" if i % 6 == 5 else "sliding_attention"
                for i in range(config.num_layers)
            ]
            global_rope = {"rope_type": "default", "rope_theta": 1_000_000.0}
            if config.global_rope_scaling_factor != 1.0:
                global_rope |= {"rope_type": "linear", "factor": config.global_rope_scaling_factor}
            local_rope = {"rope_type": "default", "rope_theta": 10_000.0}
            rope = {"full_attention": global_rope, "sliding_attention": local_rope}
            values |= {"layer_types": kinds, "rope_parameters": rope}
    else:
        family = "Gemma"
    config_name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    theirs = getattr(transformers, config_name)(**{**values, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(theirs).eval()
    load_into_transformers(model, random_weights(config, seed), config)
    return model


def make_ours(
    configuration: dict[str, Any], dtype: str = "float32", seed: int = 0
) -> GemmaBackbone:
    """Returns a backbone with `random_weights`."""
    backbone = GemmaBackbone(**configuration, dtype=dtype)
    arrays = random_weights(backbone.config, seed)
    for name, weight in backbone.named_weights().items():
        weight.assign(arrays[name])
    return backbone


def run_ours(backbone: GemmaBackbone, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Returns hidden states `[B, T, D]` and logits `[B, T, V]` for `IDS`, in float32."""
    hidden = backbone({"token_ids": IDS, "padding_mask": mask})
    logits = backbone.token_embedding(hidden, reverse=True)
    outputs = {"hidden": hidden, "logits": logits}
    return {name: ops.convert_to_numpy(ops.cast(x, "float32")) for name, x in outputs.items()}


def run_theirs(model: "transformers.PreTrainedModel", mask: np.ndarray) -> dict[str, np.ndarray]:
    """Same as `run_ours` for a transformers model."""
    import torch

    ids, mask = torch.from_numpy(IDS), torch.from_numpy(mask)
    with torch.no_grad():
        hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        logits = model(input_ids=ids, attention_mask=mask).logits
    return {"hidden": hidden.float().numpy(), "logits": logits.float().numpy()}


def largest_difference(ours: np.ndarray, theirs: np.ndarray, mask: np.ndarray) -> float:
    """Returns the largest difference without padding, relative to the largest value of `theirs`."""
    attended = mask.astype(bool)
    return float(np.abs(ours - theirs)[attended].max() / np.abs(theirs)[attended].max())


def typical_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Returns the root mean square of the difference, relative to that of `theirs`."""
    return float(np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)))
