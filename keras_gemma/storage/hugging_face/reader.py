"""Reads a Hugging Face folder: config.json, a vocabulary, safetensors or msgpack of Flax.

Knows the architectures of `config_json.py` and refuses settings that GemmaBackbone cannot express.
Reads only the text tower of a multimodal checkpoint.
Never reads pickled weights (.bin, .pt), which can run code. Reads tensors without PyTorch.
`Format` describes the functions.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keras_gemma.config import GemmaConfig
from keras_gemma.storage.files import find_weights, read_json
from keras_gemma.storage.hugging_face import config_json, flax, layout, safetensors
from keras_gemma.storage.hugging_face.tokenizer_json import is_tokenizer_json, read_tokenizer_json
from keras_gemma.storage.tensor_streaming import (
    StoredTensor,
    TensorSpec,
    join_shards,
    report_problems,
)

UNLISTED_TENSORS = ("lm_head.weight", "language_model.lm_head.weight")
"""Copies of the embedding, which an index may omit."""


def matches(folder: Path) -> bool:
    """Returns True if `folder` is a Hugging Face checkpoint, or holds its tokenizer."""
    if (folder / layout.CONFIG).is_file():
        return "model_type" in read_json(folder / layout.CONFIG)
    tokenizer = folder / layout.TOKENIZER
    return (folder / layout.VOCABULARY).is_file() or (
        tokenizer.is_file() and is_tokenizer_json(read_json(tokenizer))
    )


def read_backbone(folder: Path) -> dict[str, Any]:
    """Returns `GemmaBackbone`'s arguments, without `dtype`.

    A checkpoint's `torch_dtype` is the dtype of its files. As in KerasHub, the model takes Keras's
    global policy unless the caller asks for another.
    """
    path = folder / layout.CONFIG
    return config_json.from_values(read_json(path), path)


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """Returns `GemmaTokenizer`'s arguments: the SentencePiece vocabulary in bytes as `proto`."""
    vocabulary = folder / layout.VOCABULARY
    if vocabulary.is_file():
        return {"proto": vocabulary.read_bytes()}
    if (folder / layout.TOKENIZER).is_file():
        rows = None
        if (folder / layout.CONFIG).is_file():
            rows = config_json.vocabulary_rows(read_json(folder / layout.CONFIG))
        return {"proto": read_tokenizer_json(folder / layout.TOKENIZER, rows)}
    raise ValueError(
        f"{folder} holds no vocabulary: looked for {layout.VOCABULARY} and {layout.TOKENIZER}. "
        "Fetch one of them from the checkpoint's repository, or pass `preprocessor=None` to load "
        "only the model."
    )


@contextlib.contextmanager
def open_weights(folder: Path) -> Iterator[dict[str, StoredTensor]]:
    """Yields the tensors of the text model by their names in a text model.

    Reads the weights of Flax only if there are no safetensors.
    """
    names, tensors_of = (layout.WEIGHTS, layout.WEIGHTS_INDEX), safetensors.tensors
    flax_names = (layout.FLAX_WEIGHTS, layout.FLAX_WEIGHTS_INDEX)
    if not _has_any(folder, names) and _has_any(folder, flax_names):
        names, tensors_of = flax_names, flax.tensors
    single, index_name = names
    paths, index = find_weights(folder, single, index_name)
    shards = {path.name: tensors_of(path) for path in paths}
    if not index:
        stored = shards[single]
    else:
        if tensors_of is flax.tensors:
            index = {flax.torch_name(name): files for name, files in index.items()}
        stored = join_shards(shards, index, folder / index_name, ignored=UNLISTED_TENSORS)
    text_names = {name: layout.text_tensor_name(name) for name in stored}
    count = Counter(name for name in text_names.values() if name is not None)
    report_problems(
        [f"held {n} times: {name}" for name, n in count.items() if n > 1],
        f"The files in {folder} hold tensors under several prefixes",
        "Fetch or save the checkpoint again",
    )
    yield {name: stored[own] for own, name in text_names.items() if name is not None}


def _has_any(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).is_file() for name in names)


def tensor_specs(
    config: GemmaConfig, folder: Path | None = None, quantization: None = None
) -> dict[str, TensorSpec]:
    """Returns the tensor of each weight, by logical name. Shapes and layouts are equal.

    The architecture in config.json decides the name of a norm. `None` for `folder` uses the
    simplest architecture. `quantization` is unused: this format stores no quantized weights.
    """
    if folder is None:
        model_type = config_json.model_type_of(config)
    else:
        model_type = read_json(folder / layout.CONFIG)["model_type"]
    spare_rows = config_json.spare_rows(config)
    return {
        name: TensorSpec(
            layout.tensor_name(name, model_type),
            shape,
            padding_rows=spare_rows if name == "token_embedding" else 0,
        )
        for name, shape in config.weight_shapes().items()
    }
