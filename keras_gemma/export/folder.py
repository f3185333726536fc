"""Export folder: checked before the export, and moved to its path when it is complete.

    export.json       marks the folder as an export
    metadata.json     inputs and outputs, token ids and sizes of a program
    vocabulary.spm    the SentencePiece vocabulary of a program

A SavedModel has only the first of these files. Knows nothing about formats except their names.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keras_gemma.storage.files import (
    Kind,
    check_target,
    local_path,
    read_json,
    replacing,
    write_json,
)
from keras_gemma.version import __version__

DESCRIPTION = "export.json"
METADATA = "metadata.json"
VOCABULARY = "vocabulary.spm"


def is_export(folder: Path) -> bool:
    """Returns True if `folder` is an export of this package."""
    description = folder / DESCRIPTION
    return description.is_file() and "keras_gemma_version" in read_json(description)


EXPORTS = Kind("exports", is_export)
"""Folders that an export may replace."""


@contextlib.contextmanager
def new_folder(path: str | Path, format: str, overwrite: bool) -> Iterator[Path]:
    """Yields a temporary folder, which replaces `path` if the block does not raise."""
    target = local_path(path, "path")
    check_target(target, EXPORTS, overwrite, "path")
    with replacing(target, stale=lambda name: True, argument="path") as directory:
        yield directory
        write_json(directory / DESCRIPTION, {"format": format, "keras_gemma_version": __version__})


def write_metadata(lm: Any, directory: Path, cache_dtype: str, **more: Any) -> None:
    """Writes `metadata.json`, with the entries `more` of the format, and the vocabulary."""
    config, preprocessor = lm.backbone.config, lm.preprocessor
    tokenizer = preprocessor.tokenizer
    (directory / VOCABULARY).write_bytes(tokenizer.proto)
    cache = [cache_dtype, ["batch", "length", config.num_key_value_heads, config.head_dim]]
    content = {
        "inputs": {
            "token_ids": ["int32", ["batch", "tokens"]],
            "start": ["int32", ["batch"]],
            "last": ["int32", ["batch"]],
            "cache": cache,
        },
        "outputs": {"logits": ["float32", ["batch", config.vocabulary_size]], "cache": cache},
        "cache_arrays": 2 * config.num_layers,
        "context_length": config.context_length,
        "vocabulary": VOCABULARY,
        "start_token_id": tokenizer.start_token_id if preprocessor.add_start_token else None,
        "stop_token_ids": tokenizer.stop_token_ids,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }
    write_json(directory / METADATA, content)
