"""Writes an Orbax checkpoint that DeepMind's package `gemma` loads with `gm.ckpts.load_params`.

The files are written with the package `tensorstore`. Orbax itself needs JAX, and all arrays in
memory at once.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from keras_gemma import progress
from keras_gemma.config import GemmaConfig
from keras_gemma.storage.arguments import check_vocabulary
from keras_gemma.storage.files import write_json
from keras_gemma.storage.orbax import layout
from keras_gemma.storage.orbax.arrays import import_tensorstore

MAX_CHUNK_BYTES = 64 << 20
"""Maximum size of a chunk of an array."""

_KEY_OF_DICTIONARY = 2
"""Orbax's number for a key of a dictionary."""


def write(task: Any, folder: Path, max_shard_bytes: int) -> None:
    """Writes `task` to the empty `folder`, with its config.json and vocabulary.

    Weights keep the dtype of the model's variables. The weights of one layer are in memory at a
    time, and data files are smaller than about `max_shard_bytes`.
    """
    config = task.backbone.config
    _check(config)
    tensorstore = import_tensorstore("Writing")
    if task.preprocessor is not None:
        tokenizer = task.preprocessor.tokenizer
        check_vocabulary(tokenizer, config)
        (folder / layout.VOCABULARY).write_bytes(tokenizer.proto)
    # The arrays do not tell the settings. `keras_preset` reads this file.
    write_json(folder / layout.CONFIG, {"class_name": "GemmaBackbone", "config": config.to_dict()})
    weights = task.backbone.named_weights()
    specs = layout.tensor_specs(config, layout.transposes_gating(config))
    database = {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{folder.resolve()}/"},
        "target_data_file_size": max_shard_bytes,
    }
    context = tensorstore.Context()
    with progress.bar("Saving", sum(weight.plain_bytes for weight in weights.values())) as advance:
        for _, group in itertools.groupby(weights, lambda name: name.rpartition(".")[0]):
            transaction = tensorstore.Transaction()
            arrays: dict[str, Any] = {}
            for name in group:
                weight, spec = weights[name], specs[name]
                array, part = layout.array_and_part(spec.name)
                if array not in arrays:
                    shape = layout.stored_shape(spec)
                    description = {
                        "driver": "zarr",
                        "kvstore": {**database, "path": f"{array.replace('/', '.')}/"},
                        "metadata": _metadata(shape, weight.plain_dtype, max_shard_bytes),
                        "store_data_equal_to_fill_value": True,
                    }
                    arrays[array] = tensorstore.open(
                        description, create=True, context=context, transaction=transaction
                    ).result()
                numbers = spec.to_stored(weight.numpy())
                view = arrays[array] if part is None else arrays[array][part]
                rows = len(numbers)
                view[:rows].write(numbers).copy.result()
                if view.shape[0] > rows:  # repeats <pad>, which a model does not predict
                    unused = (view.shape[0] - rows, *numbers.shape[1:])
                    view[rows:].write(np.broadcast_to(numbers[0], unused)).copy.result()
                advance(weight.plain_bytes)
            transaction.commit_sync()
    names = {layout.array_and_part(spec.name)[0]: None for spec in specs.values()}
    write_json(folder / layout.METADATA, _tree(list(names)))


def _check(config: GemmaConfig) -> None:
    """Refuses a model that DeepMind's package would compute differently."""
    if config.layer_norm_epsilon != layout.EPSILON:
        raise ValueError(
            f"DeepMind's package computes norms with an epsilon of {layout.EPSILON}, so this model "
            "cannot be saved for it. Use `save_to_preset` instead. "
            f"Received: layer_norm_epsilon={config.layer_norm_epsilon}"
        )
    if not config.query_head_dim_normalize and config.hidden_dim % config.num_query_heads:
        raise ValueError(
            "DeepMind's package scales queries by a whole `hidden_dim` / `num_query_heads`, so "
            "this model cannot be saved for it. Use `save_to_preset` instead. Received: "
            f"hidden_dim={config.hidden_dim}, num_query_heads={config.num_query_heads}"
        )


def _metadata(shape: tuple[int, ...], dtype: str, max_shard_bytes: int) -> dict[str, Any]:
    """Returns the description of a Zarr array, in chunks of rows."""
    *outer, rows, length = (1, *shape)
    limit = min(MAX_CHUNK_BYTES, max_shard_bytes) // (length * np.dtype(dtype).itemsize)
    chunks = [*(1 for _ in outer), max(1, min(rows, limit)), length][-len(shape) :]
    return {"shape": shape, "chunks": chunks, "dtype": _zarr(dtype), "compressor": None}


def _zarr(dtype: str) -> str:
    return dtype if dtype == "bfloat16" else np.dtype(dtype).str


def _tree(names: list[str]) -> dict[str, Any]:
    """Returns Orbax's description of a tree of dictionaries with these arrays."""
    return {
        "tree_metadata": {
            str(tuple(name.split("/"))): {
                "key_metadata": [
                    {"key": key, "key_type": _KEY_OF_DICTIONARY} for key in name.split("/")
                ],
                "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
            }
            for name in names
        },
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
