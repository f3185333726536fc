"""Layout of Hugging Face's folder: file names, tensor names, config.json in both directions.

Reads and writes nothing; `reader.py` and `writer.py` follow these tables.

    gemma        two norms per layer, no soft caps, global attention in every layer
    gemma2       four norms per layer; soft caps and sliding windows as in config.json
    vaultgemma   two norms per layer; soft caps and sliding windows as in config.json
"""

from pathlib import Path
from typing import Any

from keras_gemma.checks import is_integer
from keras_gemma.config import ROPE_THETA, GemmaConfig
from keras_gemma.storage.files import check_types
from keras_gemma.storage.tensor_streaming import check_layer_count

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
VOCABULARY = "tokenizer.model"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
CHAT_TEMPLATE = "chat_template.jinja"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
SHARD = "model-{:05}-of-{:05}.safetensors"
SHARD_PATTERN = "model-*-of-*.safetensors"
FLAX_WEIGHTS = "flax_model.msgpack"
FLAX_WEIGHTS_INDEX = "flax_model.msgpack.index.json"
FLAX_SHARD_PATTERN = "flax_model-*-of-*.msgpack"

FILES = (
    *(CONFIG, GENERATION_CONFIG, VOCABULARY, TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS),
    *(CHAT_TEMPLATE, WEIGHTS, WEIGHTS_INDEX, SHARD_PATTERN),
    *(FLAX_WEIGHTS, FLAX_WEIGHTS_INDEX, FLAX_SHARD_PATTERN),
)

ARCHITECTURES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "vaultgemma": "VaultGemmaForCausalLM",
}
"""Class of transformers for each `model_type`."""

ACTIVATION = "gelu_pytorch_tanh"
LOCAL, GLOBAL = "sliding_attention", "full_attention"

_SIZES = {
    "vocab_size": "vocabulary_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_query_heads",
    "num_key_value_heads": "num_key_value_heads",
    "hidden_size": "hidden_dim",
    "head_dim": "head_dim",
}

_NUMBER, _NONE = (int, float), type(None)
_TYPES = {
    "rms_norm_eps": _NUMBER,
    "attn_logit_softcapping": (*_NUMBER, _NONE),
    "final_logit_softcapping": (*_NUMBER, _NONE),
    "sliding_window": (int, _NONE),
    "max_position_embeddings": (int,),
}
"""Accepted types of these keys of config.json."""

_TENSORS = {
    "pre_attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def tensor_name(name: str, model_type: str) -> str:
    """Returns the name of the tensor of the weight `name` of `GemmaConfig.weight_shapes`."""
    if name == "token_embedding":
        return "model.embed_tokens.weight"
    if name == "final_norm":
        return "model.norm.weight"
    _, index, kind = name.split(".")
    module = _TENSORS[kind]
    if kind == "pre_ffw_norm" and model_type == "gemma":
        module = "post_attention_layernorm"  # Gemma 1 names the norm after the layer before it
    return f"model.layers.{index}.{module}.weight"


def model_type_of(config: GemmaConfig) -> str:
    """Returns the simplest `model_type` that can express `config`."""
    if config.use_post_attention_norm != config.use_post_ffw_norm:
        raise ValueError(
            "No architecture of Hugging Face has one post norm without the other: set "
            "`use_post_attention_norm` and `use_post_ffw_norm` to the same value. Received: "
            f"use_post_attention_norm={config.use_post_attention_norm}, "
            f"use_post_ffw_norm={config.use_post_ffw_norm}"
        )
    if config.use_post_attention_norm:
        return "gemma2"
    plain = (
        not config.use_sliding_window_attention
        and config.attention_logit_soft_cap is None
        and config.final_logit_soft_cap is None
        and config.query_scale == config.head_dim**-0.5
    )
    return "gemma" if plain else "vaultgemma"


def to_values(config: GemmaConfig) -> dict[str, Any]:
    """Returns the content of config.json, without dropout, which only training uses."""
    model_type = model_type_of(config)
    values = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
        "intermediate_size": config.feed_forward_dim,
        "rms_norm_eps": config.layer_norm_epsilon,
        "hidden_act": ACTIVATION,
        "hidden_activation": ACTIVATION,
        "max_position_embeddings": config.context_length,
        "rope_theta": config.layer_kind(0).rope_theta,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
    }
    if model_type == "gemma":
        return values
    if config.hidden_dim % config.num_query_heads:
        raise ValueError(
            f"transformers reads {model_type} only if `num_query_heads` divides `hidden_dim`. "
            f"Received: hidden_dim={config.hidden_dim}, num_query_heads={config.num_query_heads}"
        )
    per_head = config.hidden_dim // config.num_query_heads
    local = config.use_sliding_window_attention
    return values | {
        "query_pre_attn_scalar": config.head_dim if config.query_head_dim_normalize else per_head,
        "attn_logit_softcapping": config.attention_logit_soft_cap,
        "final_logit_softcapping": config.final_logit_soft_cap,
        # Without local layers, a window of the whole context: transformers requires a number.
        "sliding_window": config.sliding_window_size if local else config.context_length,
        "layer_types": [LOCAL if config.is_local(i) else GLOBAL for i in range(config.num_layers)],
    }


def from_values(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns `GemmaBackbone`'s arguments. Inverse of `to_values`, for an untrusted file."""
    model_type = values.get("model_type")
    if model_type not in list(ARCHITECTURES):
        raise ValueError(
            f"{path} has model_type {model_type!r}, but this package reads "
            f"{', '.join(map(repr, ARCHITECTURES))}. Choose a checkpoint of Gemma, Gemma 2 or "
            "VaultGemma."
        )
    sizes = {key: values.get(key) for key in (*_SIZES, "intermediate_size")}
    missing = [key for key, size in sizes.items() if size is None]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}. Fetch the checkpoint again.")
    wrong = [f"{k}={size!r}" for k, size in sizes.items() if not is_integer(size) or size < 1]
    if wrong:
        raise ValueError(
            f"{path} has sizes that are not positive integers: {', '.join(wrong)}. "
            "Fetch the checkpoint again."
        )
    check_layer_count(values["num_hidden_layers"], path)
    check_types(values, _TYPES, path)
    problems = _inexpressible(values)
    if problems:
        raise ValueError(
            f"{path} has settings that GemmaBackbone does not support:\n  " + "\n  ".join(problems)
        )
    arguments = {ours: values[theirs] for theirs, ours in _SIZES.items()}
    arguments["intermediate_dim"] = 2 * values["intermediate_size"]
    arguments["layer_norm_epsilon"] = values.get("rms_norm_eps", 1e-6)
    arguments["context_length"] = values.get("max_position_embeddings", 8192)
    if model_type != "gemma":
        window = values.get("sliding_window", 4096)
        local = window is not None and LOCAL in (values.get("layer_types") or [LOCAL])
        arguments |= {
            "query_head_dim_normalize": _scales_by_head_dim(values, path),
            "use_post_ffw_norm": model_type == "gemma2",
            "use_post_attention_norm": model_type == "gemma2",
            "attention_logit_soft_cap": values.get("attn_logit_softcapping", 50.0),
            "final_logit_soft_cap": values.get("final_logit_softcapping", 30.0),
            "use_sliding_window_attention": local,
        }
        if local:
            arguments["sliding_window_size"] = window
    return arguments


def _scales_by_head_dim(values: dict[str, Any], path: Path) -> bool:
    """Returns True if queries are scaled by 1/sqrt(H), False if by 1/sqrt(D/N)."""
    scalar = values.get("query_pre_attn_scalar", 256)
    hidden, heads, head_dim = (
        values[key] for key in ("hidden_size", "num_attention_heads", "head_dim")
    )
    if scalar == head_dim or (scalar, hidden, heads, head_dim) == (224, 3584, 16, 256):
        return True  # 224 was published for the 9B models by mistake; they were trained with 256
    if isinstance(scalar, int | float) and scalar * heads == hidden:
        return False
    raise ValueError(
        f"{path} has query_pre_attn_scalar {scalar!r}, but GemmaBackbone scales queries by "
        f"head_dim ({head_dim}) or hidden_size / num_attention_heads ({hidden / heads:g})."
    )


def _inexpressible(values: dict[str, Any]) -> list[str]:
    """Returns the settings of a config.json whose mathematics the model does not support."""
    problems = []
    for key, accepted in (
        ("hidden_act", (None, "gelu", ACTIVATION)),
        ("hidden_activation", (None, "gelu", ACTIVATION)),
        ("attention_bias", (None, False)),
        ("tie_word_embeddings", (None, True)),
        ("use_bidirectional_attention", (None, False)),
        ("quantization_config", (None,)),
    ):
        if values.get(key) not in accepted:
            problems.append(f"{key}={values[key]!r}")
    # transformers 5 writes rope_parameters; earlier releases rope_theta and rope_scaling.
    plain = {"rope_type": "default", "rope_theta": ROPE_THETA}
    for key in ("rope_parameters", "rope_scaling"):
        rope = values.get(key) or {}
        if not isinstance(rope, dict) or any(plain.get(k) != value for k, value in rope.items()):
            problems.append(f"{key}={rope!r}")
    if values.get("rope_theta", ROPE_THETA) != ROPE_THETA:
        problems.append(f"rope_theta={values['rope_theta']!r}")
    kinds = values.get("layer_types")
    if values["model_type"] != "gemma" and kinds is not None:
        layers = values["num_hidden_layers"]
        alternating = [(LOCAL, GLOBAL)[i % 2] for i in range(layers)]
        if kinds not in (alternating, [GLOBAL] * layers):
            problems.append(
                f"layer_types={kinds!r}: must alternate, {LOCAL} first, or all be {GLOBAL}"
            )
    return problems
