"""Reads a Hugging Face folder: config.json, tokenizer.model or tokenizer.json, safetensors.

Knows the architectures of `layout.py` and refuses settings that GemmaBackbone cannot express.
Never reads pickled weights (.bin, .pt), which can run code. Reads tensors without PyTorch.
`formats.Format` describes the functions.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keras_gemma.config import GemmaConfig
from keras_gemma.hub_caches import read_index
from keras_gemma.storage.files import read_json, shards
from keras_gemma.storage.hugging_face.layout import (
    CONFIG,
    TOKENIZER,
    VOCABULARY,
    WEIGHTS,
    WEIGHTS_INDEX,
    from_values,
    model_type_of,
    tensor_name,
)
from keras_gemma.storage.hugging_face.safetensors import tensors
from keras_gemma.storage.hugging_face.tokenizer_json import is_tokenizer_json, read_tokenizer_json
from keras_gemma.storage.tensor_streaming import StoredTensor, TensorSpec, join_shards

IGNORED_TENSORS = ("lm_head.weight",)
"""Copy of the embedding, which the model uses as its output head."""


def matches(folder: Path) -> bool:
    """Returns True if `folder` is a Hugging Face checkpoint, or holds its tokenizer."""
    if (folder / CONFIG).is_file():
        return "model_type" in read_json(folder / CONFIG)
    tokenizer = folder / TOKENIZER
    return (folder / VOCABULARY).is_file() or (
        tokenizer.is_file() and is_tokenizer_json(read_json(tokenizer))
    )


def read_backbone(folder: Path) -> dict[str, Any]:
    """Returns `GemmaBackbone`'s arguments, without `dtype`.

    A checkpoint's `torch_dtype` is the dtype of its files. As in KerasHub, the model takes Keras's
    global policy unless the caller asks for another.

    Raises:
        ValueError: If the architecture is unknown, sizes are missing, or the model cannot express
            the settings.
    """
    path = folder / CONFIG
    return from_values(read_json(path), path)


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """Returns `GemmaTokenizer`'s arguments: the SentencePiece vocabulary in bytes as `proto`.

    Raises:
        ValueError: If the folder has no vocabulary, or only one of another kind than Gemma's.
    """
    vocabulary = folder / VOCABULARY
    if vocabulary.is_file():
        return {"proto": vocabulary.read_bytes()}
    if (folder / TOKENIZER).is_file():
        return {"proto": read_tokenizer_json(folder / TOKENIZER)}
    raise ValueError(
        f"{folder} holds no vocabulary: looked for {VOCABULARY} and {TOKENIZER}. Fetch one of "
        "them from the checkpoint's repository, or pass `preprocessor=None` to load only "
        "the model."
    )


def read_errors(folder: Path) -> dict[str, float]:
    """Returns the quantization errors, which are empty: no weight is quantized."""
    return {}


def read_preprocessor(folder: Path) -> dict[str, Any] | None:
    """Returns the preprocessor's arguments, which are empty: the format stores none."""
    return {}


@contextlib.contextmanager
def open_weights(folder: Path) -> Iterator[dict[str, StoredTensor]]:
    """Yields the tensors in the folder's safetensors by name, readable within the block.

    Raises:
        ValueError: If a file is cut short, or the index does not match its files.
        FileNotFoundError: If there are no safetensors, or shards are missing.
    """
    index: dict[str, list[str]] = {}
    if (folder / WEIGHTS).is_file():
        paths = [folder / WEIGHTS]
    elif (folder / WEIGHTS_INDEX).is_file():
        index = read_index(folder / WEIGHTS_INDEX)
        names = {name for files in index.values() for name in files}
        paths = shards(folder, names, WEIGHTS_INDEX)
    else:
        pickles = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        raise FileNotFoundError(
            f"{folder} holds no weights: looked for {WEIGHTS} and {WEIGHTS_INDEX}. "
            + (
                "Its .bin or .pt files are pickles, which can run code and are never read: "
                "save the model as safetensors."
                if pickles
                else "Pass `load_weights=False` for a model with random weights."
            )
        )
    stored = {path.name: tensors(path) for path in paths}
    if index:
        yield join_shards(stored, index, folder / WEIGHTS_INDEX, ignored=IGNORED_TENSORS)
    else:
        yield stored[WEIGHTS]


def tensor_specs(
    config: GemmaConfig, folder: Path | None = None, quantization: None = None
) -> dict[str, TensorSpec]:
    """Returns the tensor of each weight, by logical name. Shapes and layouts are equal.

    Args:
        config: Config of the model.
        folder: Folder whose config.json names the architecture, which decides the name of a norm.
            `None` uses the simplest architecture.
        quantization: Unused: this format stores no quantized weights.
    """
    model_type = read_json(folder / CONFIG)["model_type"] if folder else model_type_of(config)
    return {
        name: TensorSpec(tensor_name(name, model_type), shape)
        for name, shape in config.weight_shapes().items()
    }
