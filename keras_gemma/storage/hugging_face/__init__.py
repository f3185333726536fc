"""Hugging Face's checkpoint folder. Implements `formats.Format`.

layout.py          file names, tensor names, config.json in both directions
reader.py          reads a folder
writer.py          writes a folder
safetensors.py     locates the tensors in a safetensors file
tokenizer_json.py  converts tokenizer.json to a SentencePiece model and back
"""

from keras_gemma.storage.hugging_face.layout import (
    DEFAULT_SHARD_SIZE,
    FILES,
    LIBRARY,
    MARKERS,
    SIGNS,
    TITLE,
)
from keras_gemma.storage.hugging_face.reader import (
    IGNORED_TENSORS,
    matches,
    open_weights,
    read_backbone,
    read_errors,
    read_preprocessor,
    read_tokenizer,
    tensor_specs,
)
from keras_gemma.storage.hugging_face.writer import write

__all__ = [
    "DEFAULT_SHARD_SIZE",
    "FILES",
    "IGNORED_TENSORS",
    "LIBRARY",
    "MARKERS",
    "SIGNS",
    "TITLE",
    "matches",
    "open_weights",
    "read_backbone",
    "read_errors",
    "read_preprocessor",
    "read_tokenizer",
    "tensor_specs",
    "write",
]
