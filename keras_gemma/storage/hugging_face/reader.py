"""A Hugging Face folder, read: config.json, tokenizer.model or tokenizer.json, safetensors.

Knows the architectures of `hugging_face_layout.py`, and refuses what GemmaBackbone cannot express.
Pickled weights (.bin, .pt) are never read: they can run code. Offers the same functions as
`keras_preset.py`. Reads tensors without PyTorch.
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
from keras_gemma.storage.hugging_face.tokenizer_json import read_tokenizer_json
from keras_gemma.storage.tensor_streaming import TensorSpec, StoredTensor, join_shards

IGNORED_TENSORS = ("lm_head.weight",)
"""A copy of the embedding, which the model uses as its output head."""


def read_backbone(folder: Path) -> dict[str, Any]:
    """`GemmaBackbone`'s arguments.

    No `dtype` among them: a checkpoint's `torch_dtype` says how its files are stored, and the
    model takes Keras's own policy unless the caller asks for another, as in KerasHub.

    Raises:
        ValueError: another architecture, missing sizes, or settings the model cannot express.
    """
    path = folder / CONFIG
    return from_values(read_json(path), path)


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """`GemmaTokenizer`'s arguments: the SentencePiece vocabulary as `proto` in bytes.

    Raises:
        ValueError: the folder holds no vocabulary, or only one that is not of Gemma's kind.
    """
    vocabulary = folder / VOCABULARY
    if vocabulary.is_file():
        return {"proto": vocabulary.read_bytes()}
    if (folder / TOKENIZER).is_file():
        return {"proto": read_tokenizer_json(folder / TOKENIZER)}
    raise ValueError(
        f"{folder} holds no vocabulary: looked for {VOCABULARY} and {TOKENIZER}. Fetch one of "
        "them from the checkpoint's repository, or pass `preprocessor=None` to load the model "
        "alone."
    )


def read_errors(folder: Path) -> dict[str, float]:
    """What quantization cost each weight of the file: none is quantized."""
    return {}


def read_preprocessor(folder: Path) -> dict[str, Any] | None:
    """The preprocessor's arguments: none are stored, so its defaults hold."""
    return {}


@contextlib.contextmanager
def open_weights(folder: Path) -> Iterator[dict[str, StoredTensor]]:
    """The tensors in the folder's safetensors, by name, readable within the block.

    Raises:
        ValueError: a file is cut short, or the index does not fit its files.
        FileNotFoundError: no safetensors, or shards are missing.
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
    held = {path.name: tensors(path) for path in paths}
    if index:
        yield join_shards(held, index, folder / WEIGHTS_INDEX, ignored=IGNORED_TENSORS)
    else:
        yield held[WEIGHTS]


def tensor_specs(
    config: GemmaConfig, folder: Path | None = None, quantization: None = None
) -> dict[str, TensorSpec]:
    """For each weight's logical name, its tensor; shapes and layouts are the same.

    Args:
        config: of the model.
        folder: whose config.json names the architecture; the simplest one without it. Only the
            name of a norm depends on it.
        quantization: of the file: none.
    """
    model_type = read_json(folder / CONFIG)["model_type"] if folder else model_type_of(config)
    return {
        name: TensorSpec(tensor_name(name, model_type), shape)
        for name, shape in config.weight_shapes().items()
    }
