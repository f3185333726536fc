"""Reads a GGUF file of llama.cpp: sizes, vocabulary and weights.

Knows the architectures `gemma`, `gemma2` and `gemma3`. The package `gguf` dequantizes. llama.cpp
keeps some settings in its source instead of in the file: the pattern of Gemma 3's layers, the
rotary base of its local layers, and the query scale of the 27B models.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from keras_gemma import backend
from keras_gemma.config import GemmaConfig
from keras_gemma.quantization import STORED_TYPES, QuantizationConfig
from keras_gemma.storage.format_interface import Reader
from keras_gemma.storage.gguf.header import TensorInfo, read_header, size_of
from keras_gemma.storage.gguf.layout import (
    LOCAL_ROPE_THETA_GEMMA3,
    NUM_LAYERS_27B,
    PATTERN_GEMMA3,
    tensor_name,
)
from keras_gemma.storage.gguf.plain_forms import plain_form
from keras_gemma.storage.hugging_face.tokenizer_json import serialize_pieces
from keras_gemma.storage.tensor_streaming import StoredTensor, TensorSpec, check_layer_count
from keras_gemma.text.pieces import SPACE

ARCHITECTURES = ("gemma", "gemma2", "gemma3")

CHUNK_ELEMENTS = 1 << 22
"""Elements that are dequantized at a time."""

CONTROL_TYPES = {"<pad>": 3, "<eos>": 3, "<bos>": 3, "<unk>": 2}
"""SentencePiece type of llama.cpp's control tokens that are not plain pieces for SentencePiece."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens."""

_SIZES = {
    "block_count": "num_layers",
    "embedding_length": "hidden_dim",
    "attention.head_count": "num_query_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "context_length",
}


def read_backbone(path: Path) -> dict[str, Any]:
    header = read_header(path)
    architecture = header.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path} holds a model of the architecture {architecture!r}, but this package reads "
            f"{', '.join(map(repr, ARCHITECTURES))}. Choose a GGUF file of Gemma, Gemma 2 or "
            "Gemma 3."
        )
    if header.metadata.get("split.count", 1) not in (0, 1):
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
    if "token_embd.weight" not in header.tensors:
        missing.append("token_embd.weight")
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}. Download the file again.")
    check_layer_count(values["block_count"], path)
    arguments = {ours: values[theirs] for theirs, ours in _SIZES.items()}
    arguments |= {
        "vocabulary_size": header.tensors["token_embd.weight"].shape[0],
        "intermediate_dim": 2 * values["feed_forward_length"],
        "layer_norm_epsilon": _decimal(values.get("attention.layer_norm_rms_epsilon", 1e-6)),
        "global_rope_wavelength": float(values.get("rope.freq_base", 10_000.0)),
        "local_rope_wavelength": float(values.get("rope.freq_base_swa", LOCAL_ROPE_THETA_GEMMA3)),
    }
    arguments |= _architecture_arguments(architecture, values, path)
    if architecture != "gemma3":
        arguments["local_rope_wavelength"] = arguments["global_rope_wavelength"]
    GemmaConfig(**arguments)
    return arguments


def _architecture_arguments(
    architecture: str, values: dict[str, Any], path: Path
) -> dict[str, Any]:
    if architecture == "gemma":
        return {}
    deep = values["block_count"] == NUM_LAYERS_27B[architecture]
    arguments = {
        "query_head_dim_normalize": not deep,
        "use_post_ffw_norm": True,
        "use_post_attention_norm": True,
    }
    window = values.get("attention.sliding_window")
    if window:
        arguments |= {"use_sliding_window_attention": True, "sliding_window_size": window}
    if architecture == "gemma2":
        return arguments | {
            "attention_logit_soft_cap": values.get("attn_logit_softcapping", 50.0),
            "final_logit_soft_cap": values.get("final_logit_softcapping", 30.0),
        }
    kind, factor = values.get("rope.scaling.type", "none"), 1.0
    if kind == "linear":
        factor = float(values.get("rope.scaling.factor", 1.0))
    elif kind != "none":
        raise ValueError(
            f"{path} has rope.scaling.type {kind!r}, but 'linear' and 'none' are supported."
        )
    pattern = values.get("attention.sliding_window_pattern", PATTERN_GEMMA3)
    return arguments | {
        "final_logit_soft_cap": values.get("final_logit_softcapping") or None,
        "use_query_key_norm": True,
        "sliding_window_pattern": pattern if isinstance(pattern, int) else PATTERN_GEMMA3,
        "global_rope_scaling_factor": factor,
    }


def _decimal(value: float) -> float:
    """Returns the shortest decimal number that rounds to a float32: 1e-06."""
    return float(str(np.float32(value)))


def read_tokenizer(path: Path) -> dict[str, Any]:
    metadata = read_header(path).metadata
    names = ("tokens", "scores", "token_type")
    keys = [f"tokenizer.ggml.{name}" for name in names]
    model = metadata.get("tokenizer.ggml.model")
    missing = [key for key in keys if key not in metadata]
    if model != "llama" or missing:
        problem = (
            f"lacks {', '.join(missing)}" if missing else f"has a vocabulary of kind {model!r}"
        )
        raise ValueError(f"{path} {problem}, but a SentencePiece vocabulary is needed.")
    tokens, scores, types = (metadata[key] for key in keys)
    if not len(tokens) == len(scores) == len(types):
        raise ValueError(
            f"{path} has {len(tokens)} tokens, {len(scores)} scores and {len(types)} types: the "
            "file is damaged. Download it again."
        )
    pieces = []
    for text, score, type in zip(tokens, scores.tolist(), types.tolist(), strict=True):
        if type == CONTROL:
            type = CONTROL_TYPES.get(text, USER_DEFINED)
        elif type == USER_DEFINED:
            text = text.replace(" ", SPACE)
        pieces.append((text, score, type))
    while pieces and pieces[-1][2] == UNUSED:  # rows beyond the vocabulary
        pieces.pop()
    special = {
        "unk": metadata.get("tokenizer.ggml.unknown_token_id", 3),
        "bos": metadata.get("tokenizer.ggml.bos_token_id", 2),
        "eos": metadata.get("tokenizer.ggml.eos_token_id", 1),
        "pad": metadata.get("tokenizer.ggml.padding_token_id", 0),
    }
    dummy_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", False))
    return {"proto": serialize_pieces(pieces, special, dummy_prefix)}


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
    gguf, tensors = _import_gguf(), read_header(path).tensors
    matrices = [name for name, shape in config.weight_shapes().items() if len(shape) == 2]
    infos = {name: tensors[tensor_name(name)] for name in matrices if tensor_name(name) in tensors}
    types = {name: _kind(gguf, name, info, path).name for name, info in infos.items()}
    return {name: type for name, type in types.items() if type in STORED_TYPES}


def _remove_one(array: np.ndarray) -> np.ndarray:
    return array - 1


def _same(array: np.ndarray) -> np.ndarray:
    return array


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[dict[str, StoredTensor]]:
    """Yields the tensors of the file, dequantized when they are read."""
    gguf = _import_gguf()
    size = path.stat().st_size
    tensors = {}
    for name, info in read_header(path).tensors.items():
        kind = _kind(gguf, name, info, path)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if info.shape[-1] % block or info.offset + size_of(info.shape, block, block_bytes) > size:
            raise ValueError(f"{path} is cut short, or {name} is damaged. Download it again.")
        tensors[name] = _tensor(gguf, path, info, kind)
    yield tensors


def _kind(gguf: ModuleType, name: str, info: TensorInfo, path: Path) -> Any:
    try:
        return gguf.GGMLQuantizationType(info.type)
    except ValueError as error:
        raise ValueError(
            f"{path} holds {name} in the unknown type {info.type}. Update the package gguf, or "
            "choose a file with another quantization, such as Q8_0."
        ) from error


def _tensor(gguf: ModuleType, path: Path, info: TensorInfo, kind: Any) -> StoredTensor:
    """Returns a tensor that is dequantized in chunks, into the dtype of its weight."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    length = info.shape[-1]
    rows = math.prod(info.shape[:-1])
    row_bytes = length // block * block_bytes

    def read_bytes(file: Any, count: int) -> np.ndarray:
        return np.frombuffer(file.read(count * row_bytes), "uint8").reshape(count, row_bytes)

    def read(dtype: str = "float32") -> np.ndarray:
        dtype = dtype if dtype in ("bfloat16", "float16") else "float32"
        array = backend.empty((rows, length), dtype)
        step = max(1, CHUNK_ELEMENTS // length)
        with open(path, "rb") as file:
            file.seek(info.offset)
            for start in range(0, rows, step):
                count = min(step, rows - start)
                numbers = gguf.quants.dequantize(read_bytes(file, count), kind)
                array[start : start + count] = numbers
        return array.reshape(info.shape)

    def plain_rows(part: slice) -> backend.Quantized:
        start, stop, _ = part.indices(rows)
        with open(path, "rb") as file:
            file.seek(info.offset + start * row_bytes)
            return plain_form(read_bytes(file, stop - start), kind.name, block_bytes)

    return StoredTensor(info.shape, "float32", read, reads_as=True, plain_rows=plain_rows)


def _import_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            'Reading GGUF files needs the package gguf: `pip install "keras-gemma[gguf]"`.'
        ) from error
    return gguf


READER = Reader(
    title="GGUF file",
    read_backbone=read_backbone,
    read_tokenizer=read_tokenizer,
    tensor_specs=tensor_specs,
    open_weights=open_weights,
    read_stored_types=read_stored_types,
    # A copy of the embedding, and frequencies that `GemmaConfig` computes.
    ignored_tensors=("output.weight", "rope_freqs.weight"),
)
