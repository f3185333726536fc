"""Reads an Orbax checkpoint of DeepMind's package `gemma`: sizes, vocabulary and weights.

A checkpoint holds arrays only. Their shapes determine the sizes and the generation, `layout.py` the
other settings of the published models. A config.json of KerasHub or Hugging Face next to the
arrays has precedence. `Format` describes the functions.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from keras_gemma import backend
from keras_gemma.config import GemmaConfig
from keras_gemma.quantization import QuantizationConfig
from keras_gemma.storage.files import within
from keras_gemma.storage.hugging_face import reader as hugging_face
from keras_gemma.storage.keras_preset import reader as keras_preset
from keras_gemma.storage.orbax import layout
from keras_gemma.storage.orbax.arrays import (
    checkpoint_root,
    damaged,
    import_tensorstore,
    open_arrays,
)
from keras_gemma.storage.tensor_streaming import StoredTensor, TensorSpec, check_layer_count

VOCABULARIES = ("*.model", "*.spm")


def matches(folder: Path) -> bool:
    """Returns True if `folder` is an Orbax checkpoint, or holds only one."""
    return checkpoint_root(folder) is not None


def read_backbone(folder: Path) -> dict[str, Any]:
    """Returns `GemmaBackbone`'s arguments, without `dtype`, as for a Hugging Face checkpoint.

    Settings that neither a config.json nor a published model of these sizes has are absent.
    """
    if (folder / layout.CONFIG).is_file():
        described = keras_preset if keras_preset.matches(folder) else hugging_face
        return GemmaConfig.from_dict(described.read_backbone(folder)).to_dict()
    shapes = {name: tuple(array.shape) for name, array in open_arrays(folder).items()}
    sizes = _sizes(shapes, folder)
    arguments = sizes._asdict() | {
        "vocabulary_size": _rows_to_tokens(shapes[layout.EMBEDDING][0]),
        "intermediate_dim": 2 * sizes.feed_forward_dim,
        **layout.settings(
            sizes,
            query_key_norm=f"layer_0/{layout.QUERY_NORM}" in shapes,
            post_norms="layer_0/post_attention_norm/scale" in shapes,
        ),
    }
    del arguments["feed_forward_dim"]
    GemmaConfig.from_dict(arguments)
    return arguments


def _sizes(shapes: dict[str, tuple[int, ...]], folder: Path) -> layout.Sizes:
    numbers = [int(match[1]) for match in map(re.compile(r"layer_(\d+)/").match, shapes) if match]
    ranks = {layout.EMBEDDING: 2, f"layer_0/{layout.OUTPUT}": 3, f"layer_0/{layout.DOWN}": 2}
    if f"layer_0/{layout.KEY_VALUE}" in shapes:
        ranks[f"layer_0/{layout.KEY_VALUE}"] = 4
    wrong = [
        f"{name} {shapes.get(name, '(missing)')}"
        for name, rank in ranks.items()
        if len(shapes.get(name, ())) != rank or not 0 < max(shapes[name]) <= layout.MAX_SIZE
    ]
    if wrong:
        raise ValueError(
            f"{folder} has no sizes of a Gemma model: {', '.join(wrong)}. Fetch or save it again."
        )
    check_layer_count(max(numbers) + 1, folder)
    heads, head_dim, hidden_dim = shapes[f"layer_0/{layout.OUTPUT}"]
    key_values = shapes.get(f"layer_0/{layout.KEY_VALUE}", (3, heads))[1]
    width = shapes[f"layer_0/{layout.DOWN}"][0]
    return layout.Sizes(max(numbers) + 1, hidden_dim, width, heads, key_values, head_dim)


def _rows_to_tokens(rows: int) -> int:
    tokens = {stored: tokens for tokens, stored in layout.PADDED_VOCABULARIES.items()}
    return tokens.get(rows, rows)


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """Returns `GemmaTokenizer`'s arguments, with the vocabulary in bytes as `proto`.

    A SentencePiece file of any name is accepted, in the folder of the arrays or the one above it.
    """
    root = checkpoint_root(folder).resolve()
    for place in (root, root.parent):
        paths = sorted(path for pattern in VOCABULARIES for path in place.glob(pattern))
        if (place / layout.VOCABULARY).is_file():
            paths = [place / layout.VOCABULARY]
        if len(paths) > 1:
            raise ValueError(
                f"{place} holds several vocabularies: {', '.join(path.name for path in paths)}. "
                f"Rename that of the model to {layout.VOCABULARY}."
            )
        if paths:
            return {"proto": within(place, paths[0]).read_bytes()}
    raise ValueError(
        f"{folder} holds no vocabulary: Orbax checkpoints contain none. Copy the model's "
        f"SentencePiece file to {root / layout.VOCABULARY}, or pass `preprocessor=None` to load "
        "only the model."
    )


def tensor_specs(
    config: GemmaConfig, folder: Path | None = None, quantization: QuantizationConfig | None = None
) -> dict[str, TensorSpec]:
    """Returns the spec of each weight, by logical name.

    The gate and up projections are stored in one of two orders, which their shape shows unless F
    equals D. `quantization` is unused: this format stores no quantized weights.
    """
    transposed = layout.transposes_gating(config)
    if folder is not None and config.feed_forward_dim != config.hidden_dim:
        gating = open_arrays(folder).get(f"layer_0/{layout.GATING}")
        order = (2, config.feed_forward_dim, config.hidden_dim)
        transposed = gating is not None and tuple(gating.shape) == order
    return layout.tensor_specs(config, transposed)


@contextlib.contextmanager
def open_weights(folder: Path) -> Iterator[dict[str, StoredTensor]]:
    """Yields the arrays of the checkpoint, and the parts of those that hold several weights."""
    stored = {}
    for name, array in open_arrays(folder).items():
        count = layout.parts_of(name)
        if count is not None and tuple(array.shape[:1]) == (count,):
            views = {f"{name}[{i}]": array[i] for i in range(count)}
        else:
            views = {name: array}
        stored |= {part: _tensor(view, folder) for part, view in views.items()}
    yield stored


def _tensor(array: Any, folder: Path) -> StoredTensor:
    shape, dtype = tuple(array.shape), array.dtype.name
    tensorstore = import_tensorstore("Reading")

    def read() -> np.ndarray:
        numbers = backend.empty(shape, dtype)
        try:
            tensorstore.array(numbers).write(array).result()
        except (ValueError, OSError) as error:
            raise damaged(folder, error) from error
        return numbers

    return StoredTensor(shape, dtype, read)
