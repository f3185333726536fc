"""Reads KerasHub's preset folder: JSON descriptions, a SentencePiece vocabulary, H5 weights.

Knows only the format. `presets.py` decides which class to build and with which overrides.
`Format` describes the functions.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import keras
import ml_dtypes
import numpy as np

from keras_gemma.config import GemmaConfig
from keras_gemma.quantization import QuantizationConfig
from keras_gemma.storage.files import check_types, find_weights, read_json
from keras_gemma.storage.keras_preset import layout
from keras_gemma.storage.tensor_streaming import (
    FLOAT_DTYPES,
    StoredTensor,
    check_layer_count,
    in_file,
    join_shards,
)

_LAYER_KEYS = {"name", "trainable", "dtype", "quantization"}
_GEMMA3_KEYS = {
    "image_size",
    "vision_encoder",
    "use_bidirectional_attention",
    "is_embedding_model",
    "pooling_intermediate_dim",
    "embedding_dim",
}
"""Keys of KerasHub's Gemma 3 for images and embedding models. `GemmaConfig` refuses the latter."""
_TOKENIZERS = ("GemmaTokenizer", "Gemma3Tokenizer")
_PREPROCESSORS = ("GemmaCausalLMPreprocessor", "Gemma3CausalLMPreprocessor", "GemmaPreprocessor")
_PREPROCESSOR_KEYS = {"sequence_length", "add_start_token", "add_end_token"}

_NUMBER, _OPTIONAL = (int, float), type(None)
_JSON_TYPES = {int: (int,), bool: (bool,), float: _NUMBER, float | None: (*_NUMBER, _OPTIONAL)}
"""JSON types accepted for a field of `GemmaConfig`, which checks the values itself."""
_TYPES = {
    "name": (str,),
    "quantization": (dict, _OPTIONAL),
    "trainable": (bool,),
    "sequence_length": (int, _OPTIONAL),
    "add_bos": (bool,),
    "add_eos": (bool,),
    "add_start_token": (bool,),
    "add_end_token": (bool,),
    "has_vision_tokens": (bool,),
} | {field.name: _JSON_TYPES[field.type] for field in dataclasses.fields(GemmaConfig)}


def matches(folder: Path) -> bool:
    """Returns True if `folder` is a Keras preset, or holds its tokenizer."""
    path = folder / layout.CONFIG
    if not path.is_file():
        return (folder / layout.VOCABULARY).is_file()
    content = read_json(path)
    return "registered_name" in content or "class_name" in content


def read_backbone(folder: Path) -> dict[str, Any]:
    """Returns `GemmaBackbone`'s arguments, with `name`, `trainable` and `dtype` as saved."""
    path = folder / layout.CONFIG
    class_name, values = _read_object(path, layout.BACKBONES)
    if "dtype" in values:
        values["dtype"] = _dtype_name(values["dtype"], path)
        if values["dtype"] and "float" not in values["dtype"]:
            raise _unsupported_policy(values["dtype"], path)
    metadata = folder / layout.METADATA
    if metadata.is_file():  # KerasHub's config.json has no context length
        content = read_json(metadata)
        check_types(content, {"context_length": (int,)}, metadata)
        values |= {k: v for k, v in content.items() if k == "context_length"}
    fields = dataclasses.fields(GemmaConfig)
    known = {field.name for field in fields} | _LAYER_KEYS
    unknown = sorted(
        values.keys() - known - (_GEMMA3_KEYS if class_name == "Gemma3Backbone" else set())
    )
    if unknown:
        raise ValueError(
            f"{path} sets {', '.join(unknown)}, which GemmaBackbone does not have. "
            "The preset was saved by a later release or by a custom class."
        )
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}. Fetch or save the preset again.")
    check_layer_count(values["num_layers"], path)
    if class_name == "Gemma3Backbone":
        config = GemmaConfig.from_keras_hub("Gemma3", values)
    else:
        config = GemmaConfig.from_dict(values)
    values = {k: v for k, v in values.items() if k in _LAYER_KEYS} | config.to_dict()
    if values.get("quantization") is not None:
        try:
            quantization = QuantizationConfig.from_dict(values["quantization"])
            quantization.check_shapes(config.weight_shapes())
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}. Fetch or save the preset again.") from error
    return values


def read_errors(folder: Path) -> dict[str, float]:
    """Returns the relative error of each quantized weight whose error is known, by name."""
    path = folder / layout.METADATA
    if not path.is_file():
        return {}
    content = read_json(path)
    check_types(content, {"relative_errors": (dict,)}, path)
    errors = content.get("relative_errors", {})
    return {name: error for name, error in errors.items() if isinstance(error, float)}


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """Returns `GemmaTokenizer`'s arguments, with the vocabulary in bytes as `proto`."""
    vocabulary = folder / layout.VOCABULARY
    if not vocabulary.is_file():
        raise ValueError(
            f"{folder} holds no vocabulary: looked for {layout.VOCABULARY}. "
            "To load only the model, pass `preprocessor=None`."
        )
    values: dict[str, Any] = {}
    path = folder / layout.TOKENIZER
    if path.is_file():
        _, values = _read_object(path, _TOKENIZERS)
    defaults = {"config_file": layout.TOKENIZER, "sequence_length": None}
    defaults |= {"add_bos": False, "add_eos": False, "proto": None}
    values.pop("has_vision_tokens", None)  # every control token is one for the tokenizer
    values = {k: v for k, v in values.items() if k not in defaults or v != defaults[k]}
    if "dtype" in values:
        values["dtype"] = _dtype_name(values["dtype"], path)
    return {**values, "proto": vocabulary.read_bytes()}


def read_preprocessor(folder: Path) -> dict[str, Any] | None:
    """Returns the preprocessor's arguments, or `None` if the model was saved without one."""
    path = folder / layout.PREPROCESSOR
    if path.is_file():
        _, values = _read_object(path, _PREPROCESSORS)
        return {key: value for key, value in values.items() if key in _PREPROCESSOR_KEYS}
    task = folder / layout.TASK
    if task.is_file():
        _, values = _read_object(task)
        if values.get("preprocessor", {}) is None:
            return None
    return {}


@contextlib.contextmanager
def open_weights(folder: Path) -> Iterator[dict[str, StoredTensor]]:
    """Yields the tensors in the folder's H5 file or shards by path, readable within the block."""
    paths, index = find_weights(folder, layout.WEIGHTS, layout.WEIGHTS_INDEX)
    with contextlib.ExitStack() as stack:
        tensors = {path.name: _tensors(stack.enter_context(_open(path)), path) for path in paths}
        if index:
            index = {_group(entry): files for entry, files in index.items()}
            index = {n: f for n, f in index.items() if not n.startswith(layout.VISION_WEIGHTS)}
            source = folder / layout.WEIGHTS_INDEX
            yield join_shards(tensors, index, source, lambda name: name.rpartition("/")[0])
        else:
            yield tensors[layout.WEIGHTS]


def _read_object(path: Path, expected: tuple[str, ...] = ()) -> tuple[str, dict[str, Any]]:
    """Returns the class name and the `config` of a serialized object, after checking both."""
    content = read_json(path)
    name = content.get("class_name") or str(content.get("registered_name")).split(">")[-1]
    if expected and name not in expected:
        raise ValueError(
            f"{path} describes {name}, but this package reads {' or '.join(expected)}. "
            "Choose a preset of Gemma, Gemma 2 or Gemma 3."
        )
    config = content.get("config")
    if not isinstance(config, dict):
        raise ValueError(f"{path} lacks its `config`. Fetch or save the preset again.")
    check_types(config, _TYPES, path)
    return name, config


def _dtype_name(dtype: Any, path: Path) -> str | None:
    """Returns the name of a serialized dtype policy: `"bfloat16"`, `"mixed_float16"`."""
    if dtype is None:
        return None
    name = dtype
    if isinstance(dtype, dict) and isinstance(dtype.get("config"), dict):
        plain = dtype.get("class_name") in ("DTypePolicy", "FloatDTypePolicy")
        name = dtype["config"].get("name") if plain else None
    try:
        policy = keras.dtype_policies.get(name) if isinstance(name, str) else None
    except ValueError as error:
        raise _unsupported_policy(dtype, path) from error
    if type(policy) is not keras.DTypePolicy:
        raise _unsupported_policy(dtype, path)
    return name


def _unsupported_policy(dtype: Any, path: Path) -> ValueError:
    return ValueError(
        f"{path} has the dtype policy {dtype!r}, but only plain floating-point policies "
        "are supported. Save the model before it is quantized."
    )


def _group(entry: str) -> str:
    """Returns the H5 group of an index entry: Keras stores a layer's path or its variables'."""
    entry = entry.strip("/")
    return entry if entry.split("/")[-1] == "vars" else f"{entry}/vars".lstrip("/")


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read as an H5 file: {error}. Fetch or save the preset again."
        ) from error


def _tensors(file: h5py.File, path: Path) -> dict[str, StoredTensor]:
    """Returns all datasets of `file` by path. Soft and external links are not followed."""
    datasets: dict[str, StoredTensor] = {}

    def visit(name: str, node: h5py.Group | h5py.Dataset) -> None:
        if not isinstance(node, h5py.Dataset):
            return
        if node.external is not None or node.is_virtual:
            raise ValueError(f"{path} keeps {name} in another file: do not trust this preset.")
        opaque = node.dtype == np.dtype("V2")  # how H5 stores a bfloat16
        marked = str(node.attrs.get("dtype")) == "bfloat16"
        dtype = "bfloat16" if opaque else f"{node.dtype}{' marked bfloat16' * marked}"
        shape = (0,) if node.shape is None else tuple(node.shape)
        offset = node.id.get_offset()
        if offset is not None and dtype in (*FLOAT_DTYPES, "int8", "uint8"):
            datasets[name] = in_file(path, offset, shape, dtype)
        else:  # chunked, or without a value yet
            read = lambda: node[...].view(ml_dtypes.bfloat16) if opaque else node[...]  # noqa: E731
            datasets[name] = StoredTensor(shape, dtype, read)

    file.visititems(visit)
    return {n: t for n, t in datasets.items() if not n.startswith(layout.VISION_WEIGHTS)}
