"""KerasHub's preset folder. Implements `formats.Format`.

layout.py  file names, registered names, H5 paths and shapes
reader.py  reads a folder
writer.py  writes a folder
"""

from keras_gemma.storage.keras_preset.layout import (
    DEFAULT_SHARD_SIZE,
    FILES,
    LIBRARY,
    MARKERS,
    SIGNS,
    TITLE,
)
from keras_gemma.storage.keras_preset.reader import (
    IGNORED_TENSORS,
    matches,
    open_weights,
    read_backbone,
    read_errors,
    read_preprocessor,
    read_tokenizer,
    tensor_specs,
)
from keras_gemma.storage.keras_preset.writer import write

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
