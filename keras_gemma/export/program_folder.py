"""Metadata and vocabulary next to an exported program.

    metadata.json     inputs and outputs, ids, sizes
    vocabulary.spm    the SentencePiece vocabulary

Knows only what all program formats share.
"""

from pathlib import Path
from typing import Any

from keras_gemma.storage.files import write_json

METADATA = "metadata.json"
VOCABULARY = "vocabulary.spm"


def describe(lm: Any, directory: Path, cache_dtype: str, **more: Any) -> None:
    """Writes `metadata.json` and the vocabulary.

    Args:
        lm: A `GemmaCausalLM` with a preprocessor.
        directory: Folder of the export.
        cache_dtype: Dtype of keys and values.
        **more: Entries of the format, such as the files of its programs.
    """
    config, preprocessor = lm.backbone.config, lm.preprocessor
    tokenizer = preprocessor.tokenizer
    (directory / VOCABULARY).write_bytes(tokenizer.proto)
    cache_shape = ["batch", "length", config.num_key_value_heads, config.head_dim]
    content = {
        "inputs": {
            "token_ids": ["int32", ["batch", "tokens"]],
            "start": ["int32", ["batch"]],
            "last": ["int32", ["batch"]],
            "cache": [cache_dtype, cache_shape],
        },
        "outputs": {
            "logits": ["float32", ["batch", config.vocabulary_size]],
            "cache": [cache_dtype, cache_shape],
        },
        "cache_arrays": 2 * config.num_layers,
        "context_length": config.context_length,
        "vocabulary": VOCABULARY,
        "start_token_id": tokenizer.start_token_id if preprocessor.add_start_token else None,
        "stop_token_ids": tokenizer.stop_token_ids,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }
    write_json(directory / METADATA, content)
