"""Reads the sizes of a GGUF file of llama.cpp, and the names of its tensors.

Knows the architectures `gemma`, `gemma2` and `gemma3`. llama.cpp keeps some settings in its source
instead of in the file: the pattern of Gemma 3's layers, the rotary base of its local layers, and
the query scale of the 27B models.
"""

import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from keras_gemma.checks import is_integer, is_number
from keras_gemma.config import PATTERN_GEMMA3, ROPE_THETA, GemmaConfig
from keras_gemma.quantization import STORED_TYPES, QuantizationConfig
from keras_gemma.storage.format_interface import Reader
from keras_gemma.storage.gguf.header import read_header
from keras_gemma.storage.gguf.layout import (
    EMBEDDING,
    NUM_LAYERS_27B,
    WINDOW_GEMMA2,
    tensor_name,
)
from keras_gemma.storage.gguf.tensor_reader import kind_of, open_weights
from keras_gemma.storage.gguf.vocabulary_reader import find_ignored_part, read_tokenizer
from keras_gemma.storage.tensor_streaming import TensorSpec, check_layer_count

ARCHITECTURES = ("gemma", "gemma2", "gemma3")

_SIZES = {
    "block_count": "num_layers",
    "embedding_length": "hidden_dim",
    "attention.head_count": "num_query_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "context_length",
}


class _Metadata(NamedTuple):
    """Values of a file, whose types are checked when they are read."""

    values: dict[str, Any]
    path: Path

    def integer(self, key: str, default: int | None = None) -> int:
        return self._value(key, default, is_integer, "an integer")

    def number(self, key: str, default: float | None = None) -> float:
        return self._value(key, default, is_number, "a finite number")

    def text(self, key: str, default: str | None = None) -> str:
        return self._value(key, default, lambda value: isinstance(value, str), "text")

    def _value(self, key: str, default: Any, is_valid: Callable[[Any], bool], kind: str) -> Any:
        value = self.values.get(key, default)
        if not is_valid(value):
            raise ValueError(
                f"{self.path} must have {kind} as {key}: it is damaged, or not of Gemma. "
                f"Download it again. Received: {reprlib.repr(value)}"
            )
        return value


def read_backbone(path: Path) -> dict[str, Any]:
    header = read_header(path)
    metadata = _Metadata(header.metadata, path)
    architecture = metadata.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path} holds a model of the architecture {reprlib.repr(architecture)}, but this "
            f"package reads {', '.join(map(repr, ARCHITECTURES))}. Choose a GGUF file of Gemma, "
            "Gemma 2 or Gemma 3."
        )
    if metadata.integer("split.count", 1) not in (0, 1):
        raise ValueError(
            f"{path} is one of several files of a model. Join them first: "
            "`llama-gguf-split --merge FIRST_FILE OUTPUT`."
        )
    prefix = f"{architecture}."
    values = {
        key.removeprefix(prefix): value
        for key, value in header.metadata.items()
        if key.startswith(prefix)
    }
    missing = [key for key in (*_SIZES, "feed_forward_length") if key not in values]
    if EMBEDDING not in header.tensors:
        missing.append(EMBEDDING)
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}. Download the file again.")
    metadata = _Metadata(values, path)
    arguments = {ours: metadata.integer(theirs) for theirs, ours in _SIZES.items()}
    check_layer_count(arguments["num_layers"], path)
    rope_theta = metadata.number("rope.freq_base", 10_000.0)
    arguments |= {
        "vocabulary_size": header.tensors[EMBEDDING].shape[0],
        "intermediate_dim": 2 * metadata.integer("feed_forward_length"),
        "layer_norm_epsilon": _decimal(metadata.number("attention.layer_norm_rms_epsilon", 1e-6)),
        "global_rope_wavelength": float(rope_theta),
        "local_rope_wavelength": float(rope_theta),
    }
    arguments |= _architecture_arguments(architecture, metadata)
    try:
        GemmaConfig(**arguments)
    except ValueError as error:
        raise ValueError(
            f"{path} describes an invalid model: it is damaged. Download it again. {error}"
        ) from error
    return arguments


def _architecture_arguments(architecture: str, metadata: _Metadata) -> dict[str, Any]:
    factor = _rope_scaling_factor(metadata)
    if architecture != "gemma3" and factor != 1.0:
        raise ValueError(
            f"{metadata.path} has the rope.scaling.factor {factor:g}, which is supported for "
            f"Gemma 3, but it holds a model of the architecture {architecture!r}."
        )
    if architecture == "gemma":
        return {}
    deep = metadata.integer("block_count") == NUM_LAYERS_27B[architecture]
    arguments = {
        "query_head_dim_normalize": not deep,
        "use_post_ffw_norm": True,
        "use_post_attention_norm": True,
    }
    default_window = {"gemma2": WINDOW_GEMMA2, "gemma3": 0}[architecture]
    window = metadata.integer("attention.sliding_window", default_window)
    if window:
        arguments |= {"use_sliding_window_attention": True, "sliding_window_size": window}
    if architecture == "gemma2":
        return arguments | {
            "attention_logit_soft_cap": metadata.number("attn_logit_softcapping", 50.0),
            "final_logit_soft_cap": metadata.number("final_logit_softcapping", 30.0),
        }
    return arguments | {
        "final_logit_soft_cap": metadata.number("final_logit_softcapping", 0.0) or None,
        "use_query_key_norm": True,
        "sliding_window_pattern": metadata.integer(
            "attention.sliding_window_pattern", PATTERN_GEMMA3
        ),
        "local_rope_wavelength": float(metadata.number("rope.freq_base_swa", ROPE_THETA)),
        "global_rope_scaling_factor": factor,
    }


def _rope_scaling_factor(metadata: _Metadata) -> float:
    """Returns the factor of linear scaling. As in llama.cpp, a file without a type is linear."""
    type = metadata.text("rope.scaling.type", "linear")
    if type not in ("linear", "none"):
        raise ValueError(
            f"{metadata.path} has rope.scaling.type {reprlib.repr(type)}, but 'linear' and 'none' "
            "are supported."
        )
    factor = float(metadata.number("rope.scaling.factor", 1.0))
    return 1.0 if type == "none" else factor or 1.0  # 0 disables scaling


def _decimal(value: float) -> float:
    """Returns the shortest decimal number that rounds to a float32: 1e-06."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))


def tensor_specs(
    config: GemmaConfig, path: Path | None = None, quantization: QuantizationConfig | None = None
) -> dict[str, TensorSpec]:
    types = (quantization and quantization.types) or {}
    return {
        # llama.cpp stores the scale of a norm, this package stores w of the scale (1 + w).
        name: TensorSpec(
            tensor_name(name),
            shape,
            _remove_one if len(shape) == 1 else _same,
            as_stored=name in types,
        )
        for name, shape in config.weight_shapes().items()
    }


def read_stored_types(path: Path, config: GemmaConfig) -> dict[str, str]:
    tensors = read_header(path).tensors
    matrices = [name for name, shape in config.weight_shapes().items() if len(shape) == 2]
    infos = {name: tensors[tensor_name(name)] for name in matrices if tensor_name(name) in tensors}
    types = {name: kind_of(name, info, path).name for name, info in infos.items()}
    return {name: type for name, type in types.items() if type in STORED_TYPES}


def _remove_one(array: np.ndarray) -> np.ndarray:
    return array - 1


def _same(array: np.ndarray) -> np.ndarray:
    return array


READER = Reader(
    title="GGUF file",
    read_backbone=read_backbone,
    read_tokenizer=read_tokenizer,
    tensor_specs=tensor_specs,
    open_weights=open_weights,
    read_stored_types=read_stored_types,
    find_ignored_part=find_ignored_part,
)
