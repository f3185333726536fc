"""Layout of KerasHub's folder: file names, registered names, H5 paths and shapes.

Reads and writes nothing; `reader.py` and `writer.py` follow these tables.
"""

from pathlib import Path

import numpy as np

from keras_gemma import backend
from keras_gemma.backend import quantized
from keras_gemma.config import GemmaConfig
from keras_gemma.quantization import QuantizationConfig
from keras_gemma.storage.tensor_streaming import (
    QuantizedTensorSpec,
    Specs,
    TensorSpec,
    per_head_spec,
)

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
PREPROCESSOR = "preprocessor.json"
TASK = "task.json"
METADATA = "metadata.json"
VOCABULARY = "assets/tokenizer/vocabulary.spm"
WEIGHTS = "model.weights.h5"
WEIGHTS_INDEX = "model.weights.json"
SHARD = "model_{:05}.weights.h5"
SHARD_PATTERN = "model_*.weights.h5"

BACKBONE_FILES = (TASK, WEIGHTS, WEIGHTS_INDEX, SHARD_PATTERN)
"""Files that a new backbone replaces or outdates."""
PART_FILES = {
    "backbone": (CONFIG, METADATA, *BACKBONE_FILES),
    "preprocessor": (TOKENIZER, PREPROCESSOR, VOCABULARY),
    "tokenizer": (TOKENIZER, VOCABULARY),
}
"""Files of a part of a model that is saved by itself."""
FILES = (CONFIG, TOKENIZER, PREPROCESSOR, METADATA, VOCABULARY, *BACKBONE_FILES)

KERAS_HUB_VERSION = "0.32.0"
"""The release whose folder format is written."""

QUANTIZED_BACKBONE = "QuantizedGemmaBackbone"
"""Class name in config.json of a quantized model, unknown to KerasHub so that it refuses the
preset. The arguments are those of `GemmaBackbone`, for Gemma 3 too.
"""

CUSTOM_BACKBONE = "CustomGemmaBackbone"
"""Class name in config.json of a model that KerasHub's classes cannot express."""

BACKBONES = ("GemmaBackbone", "Gemma3Backbone", QUANTIZED_BACKBONE, CUSTOM_BACKBONE)

MODULES = {
    "Backbone": "backbone",
    "Tokenizer": "tokenizer",
    "CausalLMPreprocessor": "causal_lm_preprocessor",
    "CausalLM": "causal_lm",
}
"""Ending of KerasHub's module of each class, by the class name without the family."""

VISION_WEIGHTS = "layers/gemma3_vision_encoder"
"""Path of the vision encoder in the H5 file. It is not read."""

MAX_PADDING_ROWS = 128
"""Unused rows at the end of the embedding in checkpoints that were trained in JAX."""

_FEED_FORWARD = {"gate": "gating_ffw", "up": "gating_ffw_2", "down": "ffw_linear"}


def layer_path(kind: str) -> str:
    """Returns the path in a block of the layer with one kind of weight, such as `"query"`."""
    if kind in ("query", "key", "value", "output"):
        return f"attention/{kind}_dense"
    if kind in ("query_norm", "key_norm"):
        return f"attention/{kind}"
    return _FEED_FORWARD.get(kind, kind)


def h5_specs(config: GemmaConfig) -> dict[str, TensorSpec]:
    """Returns the path and shape in the H5 file of each weight, by the weight's logical name.

    logical [out, in]     KerasHub
    [V, D]                [V, D]
    query    [N·H, D]     [N, D, H]       key and value with K for N
    output   [D, N·H]     [N, H, D]
    gate, up [F, D]       [D, F]
    down     [D, F]       [F, D]
    norms    [D], [H]     [D], [H]
    """
    return {name: _h5_spec(name, shape, config) for name, shape in config.weight_shapes().items()}


def tensor_specs(
    config: GemmaConfig, folder: Path | None, quantization: QuantizationConfig | None
) -> Specs:
    """Returns the specs of a model that may be quantized. They are the same for all folders.

    KerasHub refuses a quantized model by its class. There, two or three datasets of the logical
    matrix `[out, in]` replace its `vars/0`:

        vars/values   int8 [out, in]; in 4 bits uint8 [out, in / 2], two values a byte: the low
                      half bytes are the first half of a row, the high ones the second
        vars/scales   float32 [out]; in 4 bits bfloat16 [out, in / group_size]; for a weight as
                      stored in a GGUF file float16 or float32 [out, in / group_size]
        vars/zeros    same as the scales, if groups have a zero point
        vars/minimums same as the scales, if groups have a minimum

    A number is `scale * (value - zero) + minimum`. A 4-bit value is 0 to 15 with a zero point or a
    minimum, and -8 to 7 in two's complement without one.
    """
    specs: dict[str, TensorSpec | QuantizedTensorSpec] = dict(h5_specs(config))
    for name, shape in config.weight_shapes().items():
        of_weight = quantization and quantization.within(name)
        if of_weight is not None and len(shape) == 2:
            kind = "embedding" if name == "token_embedding" else "matrix"
            path = specs[name].name.removesuffix("/0")
            spec = quantized.spec(shape, "matrix", of_weight.layout(kind))
            parts = {
                part: TensorSpec(f"{path}/{part}", entry[0], dtypes=(entry[1],))
                for part, entry in spec.by_file_name().items()
            }
            specs[name] = QuantizedTensorSpec(backend.Quantized.from_file_names(parts))
    return specs


def _h5_spec(name: str, shape: tuple[int, ...], config: GemmaConfig) -> TensorSpec:
    if name == "token_embedding":
        path = "layers/reversible_embedding/vars/0"
        return TensorSpec(path, shape, padding_rows=MAX_PADDING_ROWS)
    if name == "final_norm":
        return TensorSpec("layers/rms_normalization/vars/0", shape)

    _, index, kind = name.split(".")
    # Keras derives the path of a block from the name of its class.
    block = f"layers/{config.family.lower()}_decoder_block" + (f"_{index}" if index != "0" else "")
    path = f"{block}/{layer_path(kind)}/vars/0"
    if kind in ("query", "key", "value", "output"):
        return per_head_spec(path, shape, kind, config.head_dim)
    if kind in _FEED_FORWARD:
        return TensorSpec(path, shape[::-1], np.transpose, np.transpose)
    return TensorSpec(path, shape)
