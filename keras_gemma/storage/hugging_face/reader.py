"""Reads a Hugging Face folder: config.json, tokenizer.model or tokenizer.json, safetensors.

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
from keras_gemma.storage.hugging_face import config_json, layout
from keras_gemma.storage.hugging_face.safetensors import tensors
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
    """Yields the tensors of the text model by their names in a text model."""
    paths, index = find_weights(folder, layout.WEIGHTS, layout.WEIGHTS_INDEX)
    shards = {path.name: tensors(path) for path in paths}
    if index:
        source = folder / layout.WEIGHTS_INDEX
        stored = join_shards(shards, index, source, ignored=UNLISTED_TENSORS)
    else:
        stored = shards[layout.WEIGHTS]
    names = {name: layout.text_tensor_name(name) for name in stored}
    count = Counter(name for name in names.values() if name is not None)
    report_problems(
        [f"held {n} times: {name}" for name, n in count.items() if n > 1],
        f"The files in {folder} hold tensors under several prefixes",
        "Fetch or save the checkpoint again",
    )
    yield {name: stored[own] for own, name in names.items() if name is not None}


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
