"""Hugging Face's config.json, in both directions.

Reads and writes no files; `reader.py` and `writer.py` do.

    gemma        two norms per layer, no soft caps, global attention in every layer
    gemma2       four norms per layer; soft caps and sliding windows as in config.json
    vaultgemma   two norms per layer; soft caps and sliding windows as in config.json
    gemma3_text  as gemma2, with norms of queries and keys, and a rotary base per kind of layer
    gemma3       gemma3_text in `text_config`, and a vision tower, which is not read
"""

from pathlib import Path
from typing import Any

from keras_gemma.checks import is_integer, is_number
from keras_gemma.config import (
    PATTERN_GEMMA3,
    ROPE_THETA,
    ROPE_THETA_GEMMA3,
    GemmaConfig,
    in_local_part,
)
from keras_gemma.storage.files import check_types
from keras_gemma.storage.tensor_streaming import check_layer_count

ARCHITECTURES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "vaultgemma": "VaultGemmaForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
"""Class of transformers for each `model_type` that is written."""

NESTED = {"gemma3": "gemma3_text"}
"""`model_type` of the text tower in each multimodal `model_type`."""

ACTIVATION = "gelu_pytorch_tanh"
LOCAL, GLOBAL = "sliding_attention", "full_attention"
VOCABULARY_SIZE_GEMMA3, PADDED_VOCABULARY_SIZE_GEMMA3 = 262_144, 262_208
"""Number of tokens, and of embedding rows in multimodal checkpoints.

The rows after the tokens are random numbers; the first one is replaced by images.
"""

_GEMMA = {"rms_norm_eps": 1e-6, "max_position_embeddings": 8192}
_GEMMA2 = _GEMMA | {
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "vaultgemma": _GEMMA2,
    "gemma3_text": _GEMMA2
    | {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "max_position_embeddings": 131_072,
        "vocab_size": PADDED_VOCABULARY_SIZE_GEMMA3,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
    },
}
"""Values of absent keys, as in transformers. The text towers of Gemma 3 omit equal sizes."""

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
    "sliding_window_pattern": (int, _NONE),
    "_sliding_window_pattern": (int, _NONE),
    "max_position_embeddings": (int,),
    "layer_types": (list, _NONE),
}
"""Accepted types of these keys of config.json."""


def model_type_of(config: GemmaConfig) -> str:
    """Returns the simplest `model_type` that can express `config`."""
    if config.use_post_attention_norm != config.use_post_ffw_norm:
        raise ValueError(
            "No architecture of Hugging Face has one post norm without the other: set "
            "`use_post_attention_norm` and `use_post_ffw_norm` to the same value. Received: "
            f"use_post_attention_norm={config.use_post_attention_norm}, "
            f"use_post_ffw_norm={config.use_post_ffw_norm}"
        )
    if config.use_query_key_norm:
        if not config.use_post_attention_norm:
            raise ValueError(
                "No architecture of Hugging Face normalizes queries and keys without post norms: "
                "set `use_post_attention_norm` and `use_post_ffw_norm` to True. Received: "
                "use_query_key_norm=True, use_post_attention_norm=False"
            )
        if config.local_rope_scaling_factor != 1.0:
            raise ValueError(
                "Hugging Face's Gemma 3 scales only the positions of global layers: set "
                "`local_rope_scaling_factor` to 1. Received: "
                f"local_rope_scaling_factor={config.local_rope_scaling_factor:g}"
            )
        return "gemma3_text"
    for layer in range(config.num_layers):
        kind = config.layer_kind(layer)
        if (kind.rope_theta, kind.rope_scaling) != (ROPE_THETA, 1.0):
            raise ValueError(
                "Without `use_query_key_norm`, a model is saved for Hugging Face only with rotary "
                f"wavelengths of {ROPE_THETA:g} and scaling factors of 1. Received, in layer "
                f"{layer}: wavelength={kind.rope_theta:g}, scaling_factor={kind.rope_scaling:g}"
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
        "rope_theta": config.global_rope_wavelength,
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
    pattern = config.sliding_window_pattern if local else 1
    values |= {
        "query_pre_attn_scalar": config.head_dim if config.query_head_dim_normalize else per_head,
        "attn_logit_softcapping": config.attention_logit_soft_cap,
        "final_logit_softcapping": config.final_logit_soft_cap,
        # Without local layers, a window of the whole context: transformers requires a number.
        "sliding_window": config.sliding_window_size if local else config.context_length,
        "layer_types": _layer_types(pattern, config.num_layers),
    }
    if model_type != "gemma3_text":
        return values
    factor = config.global_rope_scaling_factor
    return values | {
        "sliding_window_pattern": pattern,  # for transformers before `layer_types`
        # transformers 4 and 5 read these two; only 5 reads `rope_parameters`.
        "rope_local_base_freq": config.local_rope_wavelength,
        "rope_scaling": None if factor == 1.0 else {"rope_type": "linear", "factor": factor},
    }


def from_values(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns `GemmaBackbone`'s arguments. Inverse of `to_values`, for an untrusted file."""
    values = _text_values(values, path)
    model_type = values["model_type"]
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
    arguments = {ours: values[theirs] for theirs, ours in _SIZES.items()}
    arguments["intermediate_dim"] = 2 * values["intermediate_size"]
    arguments["layer_norm_epsilon"] = values["rms_norm_eps"]
    arguments["context_length"] = values["max_position_embeddings"]
    if model_type == "gemma3_text":
        arguments |= _gemma3_arguments(values, problems)
    if model_type != "gemma":
        arguments |= _window_arguments(values, problems)
    if problems:
        raise ValueError(
            f"{path} has settings that GemmaBackbone does not support:\n  " + "\n  ".join(problems)
        )
    if model_type != "gemma":
        arguments |= {
            "query_head_dim_normalize": _scales_by_head_dim(values, path),
            "use_post_ffw_norm": model_type != "vaultgemma",
            "use_post_attention_norm": model_type != "vaultgemma",
            "attention_logit_soft_cap": values["attn_logit_softcapping"],
            "final_logit_soft_cap": values["final_logit_softcapping"],
        }
    return arguments


def vocabulary_rows(values: dict[str, Any]) -> int | None:
    """Returns the number of tokens that the model embeds, or `None` if config.json is damaged.

    Unlike `from_values`, this works for a model that cannot be loaded, whose tokenizer can.
    """
    text = values.get("text_config", values)
    rows = text.get("vocab_size", PADDED_VOCABULARY_SIZE_GEMMA3) if isinstance(text, dict) else None
    if rows == PADDED_VOCABULARY_SIZE_GEMMA3:
        return VOCABULARY_SIZE_GEMMA3
    return rows if is_integer(rows) else None


def spare_rows(config: GemmaConfig) -> int:
    """Returns the number of embedding rows that a checkpoint may have beyond the vocabulary."""
    padded = config.vocabulary_size == VOCABULARY_SIZE_GEMMA3
    return PADDED_VOCABULARY_SIZE_GEMMA3 - VOCABULARY_SIZE_GEMMA3 if padded else 0


def _text_values(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns the values of the text model, with defaults for absent keys."""
    model_type = values.get("model_type")
    if model_type not in [*ARCHITECTURES, *NESTED]:
        raise ValueError(
            f"{path} has model_type {model_type!r}, but this package reads "
            f"{', '.join(map(repr, [*ARCHITECTURES, *NESTED]))}. Choose a checkpoint of Gemma, "
            "Gemma 2, Gemma 3 or VaultGemma."
        )
    if model_type in NESTED:
        text = values.get("text_config")
        if not isinstance(text, dict):
            raise ValueError(
                f"{path} has model_type {model_type!r}, but no `text_config` with the sizes of the "
                f"text model. Fetch the checkpoint again. Received: text_config={text!r:.60}"
            )
        model_type = NESTED[model_type]
        if text.get("model_type", model_type) != model_type:
            raise ValueError(
                f"{path} has a text_config with model_type {text['model_type']!r}, but this "
                f"package reads {model_type!r}. Choose a checkpoint of Gemma 3."
            )
        whole = ("tie_word_embeddings", "quantization_config")  # settings of both towers
        values = text | {key: values[key] for key in whole if key in values}
    return _DEFAULTS[model_type] | values | {"model_type": model_type}


def _gemma3_arguments(values: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Returns the arguments that only Gemma 3 has. Appends unsupported settings to `problems`."""
    arguments: dict[str, Any] = {"use_query_key_norm": True}
    if values["vocab_size"] == PADDED_VOCABULARY_SIZE_GEMMA3:
        arguments["vocabulary_size"] = VOCABULARY_SIZE_GEMMA3
    # transformers 5 writes rope_parameters per kind of layer; earlier releases the other keys.
    parameters = values.get("rope_parameters") or {}
    if not isinstance(parameters, dict) or set(parameters) - {LOCAL, GLOBAL}:
        problems.append(f"rope_parameters={parameters!r}")
        parameters = {}
    for name, kind, key, default, scaling in (
        ("local", LOCAL, "rope_local_base_freq", ROPE_THETA, None),
        ("global", GLOBAL, "rope_theta", ROPE_THETA_GEMMA3, values.get("rope_scaling")),
    ):
        stored = [rope for rope in (parameters.get(kind), scaling) if rope is not None]
        rope: dict[str, Any] = {"rope_theta": values.get(key, default)}
        if all(isinstance(part, dict) for part in stored):
            for part in stored:
                rope |= part
            rope_type = rope.pop("rope_type", rope.pop("type", "default"))
            keys = {"rope_theta", "factor"} if rope_type == "linear" else {"rope_theta"}
            known = rope_type in ("linear", "default")
            if known and set(rope) == keys and all(map(is_number, rope.values())):
                arguments[f"{name}_rope_wavelength"] = float(rope["rope_theta"])
                arguments[f"{name}_rope_scaling_factor"] = float(rope.get("factor", 1.0))
                continue
        problems.append(f"rotary embeddings of {kind}: {stored or rope!r}")
    return arguments


def _window_arguments(values: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Returns the arguments of local layers. Appends unsupported settings to `problems`."""
    layers, kinds, window = (
        values.get(key) for key in ("num_hidden_layers", "layer_types", "sliding_window")
    )
    is_gemma3 = values["model_type"] == "gemma3_text"
    pattern = 2
    if is_gemma3:
        declared = (values.get(f"{mark}sliding_window_pattern") for mark in ("", "_"))
        pattern = next((number for number in declared if number is not None), PATTERN_GEMMA3)
        if pattern < 1:
            problems.append(f"sliding_window_pattern={pattern}: must be positive")
            return {}
    if kinds not in (None, _layer_types(pattern, layers)):
        pattern = 1 + (kinds.index(GLOBAL) if GLOBAL in kinds else layers)
        if kinds != _layer_types(pattern, layers):
            problems.append(
                f"layer_types={kinds!r}: must repeat layers of {LOCAL} and a last layer of {GLOBAL}"
            )
    if pattern == 1 or (window is None and not is_gemma3):
        return {"use_sliding_window_attention": False}
    if window is None:
        problems.append("sliding_window=None")
    return {
        "use_sliding_window_attention": True,
        "sliding_window_size": window,
        "sliding_window_pattern": pattern,
    }


def _layer_types(pattern: int, layers: int) -> list[str]:
    return [LOCAL if in_local_part(i, pattern) else GLOBAL for i in range(layers)]


def _scales_by_head_dim(values: dict[str, Any], path: Path) -> bool:
    """Returns True if queries are scaled by 1/sqrt(H), False if by 1/sqrt(D/N)."""
    scalar, hidden, heads, head_dim = (
        values[key]
        for key in ("query_pre_attn_scalar", "hidden_size", "num_attention_heads", "head_dim")
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
    """Returns the settings of any architecture whose mathematics the model does not support."""
    problems = []
    # Gemma 1 computes the approximation by tanh under both names, as it was trained.
    activations = (None, ACTIVATION, *(["gelu"] if values["model_type"] == "gemma" else []))
    for key, accepted in (
        ("hidden_act", (None, "gelu", ACTIVATION)),
        ("hidden_activation", activations),
        ("attention_bias", (None, False)),
        ("tie_word_embeddings", (None, True)),
        ("use_bidirectional_attention", (None, False)),
        ("quantization_config", (None,)),
    ):
        if values.get(key) not in accepted:
            problems.append(f"{key}={values[key]!r}")
    if values["model_type"] == "gemma3_text":
        return problems
    # transformers 5 writes rope_parameters; earlier releases rope_theta and rope_scaling.
    plain = {"rope_type": "default", "rope_theta": ROPE_THETA}
    for key in ("rope_parameters", "rope_scaling"):
        rope = values.get(key) or {}
        if not isinstance(rope, dict) or any(plain.get(k) != value for k, value in rope.items()):
            problems.append(f"{key}={rope!r}")
    if values.get("rope_theta", ROPE_THETA) != ROPE_THETA:
        problems.append(f"rope_theta={values['rope_theta']!r}")
    return problems
