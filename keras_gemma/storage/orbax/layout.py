"""Layout of DeepMind's checkpoints: names and shapes of arrays, and what they do not say.

Reads and writes nothing; `reader.py` and `writer.py` follow these tables. An array may hold two or
three weights along its first axis. `name[1]` is the second of them.
"""

import re
from typing import Any, NamedTuple

import numpy as np

from keras_gemma.catalogue import presets
from keras_gemma.config import PATTERN_GEMMA3, ROPE_THETA_GEMMA3, GemmaConfig
from keras_gemma.storage.tensor_streaming import TensorSpec, per_head_spec

CONFIG = "config.json"
VOCABULARY = "tokenizer.model"
MANIFEST = "manifest.ocdbt"
METADATA = "_METADATA"
CHECKPOINT_METADATA = "_CHECKPOINT_METADATA"
_DATA = f"d/{'[0-9a-f]' * 32}"

FILES = (
    *(MANIFEST, METADATA, CHECKPOINT_METADATA, "_sharding", "commit_success.txt", _DATA),
    *("array_metadatas/process_*", "ocdbt.process_*/manifest.ocdbt", f"ocdbt.process_*/{_DATA}"),
)

EPSILON = 1e-6
"""Epsilon of all norms in DeepMind's package."""

EMBEDDING, FINAL_NORM = "embedder/input_embedding", "final_norm/scale"
TOGETHER, KEY_VALUE = "attn/qkv_einsum/w", "attn/kv_einsum/w"
OUTPUT, QUERY_NORM = "attn/attn_vec_einsum/w", "attn/_query_norm/scale"
GATING, DOWN = "mlp/gating_einsum", "mlp/linear"

PARTS = {TOGETHER: 3, KEY_VALUE: 2, GATING: 2}
"""Number of weights in an array along its first axis."""

_LAYER_ARRAYS = {
    "pre_attention_norm": "pre_attention_norm/scale",
    "query_norm": QUERY_NORM,
    "key_norm": "attn/_key_norm/scale",
    "output": OUTPUT,
    "post_attention_norm": "post_attention_norm/scale",
    "pre_ffw_norm": "pre_ffw_norm/scale",
    "gate": f"{GATING}[0]",
    "up": f"{GATING}[1]",
    "down": DOWN,
    "post_ffw_norm": "post_ffw_norm/scale",
}
_ATTENTION = {
    True: {part: f"{TOGETHER}[{i}]" for i, part in enumerate(("query", "key", "value"))},
    False: {"query": "attn/q_einsum/w", "key": f"{KEY_VALUE}[0]", "value": f"{KEY_VALUE}[1]"},
}
"""Arrays of the projections, by whether each query head has its own key/value head."""

PADDED_VOCABULARIES = {256_000: 256_128}
"""Rows of the embedding in files of Gemma 1 and 2, by their tokens. The last rows are unused."""

MAX_SIZE = 1 << 24
"""Largest size of an axis that is taken for a size, far beyond any Gemma."""

_IGNORED = re.compile(r"(?:SigLiPFromPatches_0|vision_encoder)/|embedder/(?:mm|audio)_")
"""Names of arrays that only images and sound need."""
_LAYER = re.compile(r"(?:layer_\d+|stacked_layers/attention_type_\d+)/")
_PART = re.compile(r"(.*)\[(\d)\]")


class Sizes(NamedTuple):
    """Sizes that distinguish the published models."""

    num_layers: int
    hidden_dim: int
    feed_forward_dim: int
    num_query_heads: int
    num_key_value_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: GemmaConfig) -> "Sizes":
        return cls(*(getattr(config, name) for name in cls._fields))


REQUIRED_ARGUMENTS = (
    *("query_head_dim_normalize", "sliding_window_size", "global_rope_scaling_factor"),
    "context_length",
)
"""Settings in which published models of one generation differ, and that shapes do not determine."""

_POST_NORMS = {"use_post_attention_norm": True, "use_post_ffw_norm": True}
_GEMMA1 = {
    "query_head_dim_normalize": True,
    "sliding_window_size": 4096,
    "global_rope_scaling_factor": 1.0,
    "context_length": 8192,
}
_GEMMA2 = _POST_NORMS | {
    "attention_logit_soft_cap": 50.0,
    "final_logit_soft_cap": 30.0,
    "use_sliding_window_attention": True,
    "sliding_window_size": 4096,
    "global_rope_scaling_factor": 1.0,
    "context_length": 8192,
}
_GEMMA3 = _POST_NORMS | {
    "use_query_key_norm": True,
    "use_sliding_window_attention": True,
    "sliding_window_pattern": PATTERN_GEMMA3,
    "global_rope_wavelength": ROPE_THETA_GEMMA3,
}

_GATING_AS_IN_GEMMA3 = (3584, 4608)
"""Hidden dims of the models of Gemma 2 whose gate and up projections are stored as `[F, D]`."""


def settings(sizes: Sizes, query_key_norm: bool, post_norms: bool) -> dict[str, Any]:
    """Returns the arguments of `GemmaBackbone` that follow from the generation and the sizes.

    Without a published model of these sizes, settings of `REQUIRED_ARGUMENTS` are absent.
    """
    if not query_key_norm and not post_norms:
        return _GEMMA1
    arguments = _GEMMA3 if query_key_norm else _GEMMA2
    for preset in presets().values():
        config = preset.config
        if config.use_query_key_norm == query_key_norm and Sizes.of(config) == sizes:
            return arguments | {name: getattr(config, name) for name in REQUIRED_ARGUMENTS}
    return arguments


def canonical_name(key: str) -> str | None:
    """Returns DeepMind's name of an array from its key in a checkpoint, `None` if it is ignored.

    Published checkpoints, models saved by the package and training checkpoints differ:

        transformer/layer_0/mlp/gating_einsum.w
        layer_0.mlp.gating_einsum
        params.layer_0.mlp.gating_einsum
    """
    name = re.sub("^(?:params/|transformer/)", "", key.replace(".", "/"))
    name = re.sub("(/mlp/(?:gating_einsum|linear))/w$", r"\1", name)
    return None if _IGNORED.match(name) else name


def is_known(name: str) -> bool:
    """Returns True if a text model of Gemma 1, 2 or 3 has this array."""
    if name in (EMBEDDING, FINAL_NORM):
        return True
    names = (*_LAYER_ARRAYS.values(), *_ATTENTION[True].values(), *_ATTENTION[False].values())
    match = _LAYER.match(name)
    return match is not None and name[match.end() :] in {array_and_part(name)[0] for name in names}


def array_and_part(name: str) -> tuple[str, int | None]:
    """Returns `("x", 1)` for the part `x[1]` of an array, and `("x", None)` for an array `x`."""
    match = _PART.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, None)


def parts_of(name: str) -> int | None:
    """Returns the number of weights in an array along its first axis, `None` without that axis."""
    return PARTS.get(_LAYER.sub("", name))


def transposes_gating(config: GemmaConfig) -> bool:
    """Returns True if DeepMind stores this model's gate and up projections as `[F, D]`."""
    return config.use_query_key_norm or config.hidden_dim in _GATING_AS_IN_GEMMA3


def stored_shape(spec: TensorSpec) -> tuple[int, ...]:
    """Returns the shape of the array that holds the weight of `spec`, with unused rows."""
    parts = parts_of(array_and_part(spec.name)[0])
    if parts is not None:
        return (parts, *spec.shape)
    return (spec.shape[0] + spec.padding_rows, *spec.shape[1:])


def tensor_specs(config: GemmaConfig, transposed: bool) -> dict[str, TensorSpec]:
    """Returns the array, or part of one, and its shape for each weight, by logical name.

    logical [out, in]     DeepMind
    [V, D]                [V, D]
    query    [N·H, D]     [N, D, H]       key and value with K for N
    output   [D, N·H]     [N, H, D]
    gate, up [F, D]       [D, F], or [F, D] if `transposed`
    down     [D, F]       [F, D]
    norms    [D]          [D]
    """
    shapes = config.weight_shapes().items()
    return {name: _spec(name, shape, config, transposed) for name, shape in shapes}


def _spec(name: str, shape: tuple[int, ...], config: GemmaConfig, transposed: bool) -> TensorSpec:
    if name == "token_embedding":
        rows = PADDED_VOCABULARIES.get(shape[0], shape[0])
        return TensorSpec(EMBEDDING, shape, padding_rows=rows - shape[0])
    if name == "final_norm":
        return TensorSpec(FINAL_NORM, shape)
    _, index, kind = name.split(".")
    attention = _ATTENTION[config.num_query_heads == config.num_key_value_heads]
    array = f"layer_{index}/{(_LAYER_ARRAYS | attention)[kind]}"
    if kind in ("query", "key", "value", "output"):
        return per_head_spec(array, shape, kind, config.head_dim)
    if kind == "down" or (kind in ("gate", "up") and not transposed):
        return TensorSpec(array, shape[::-1], np.transpose, np.transpose)
    return TensorSpec(array, shape)
