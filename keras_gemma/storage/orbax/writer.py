"""Writes an Orbax checkpoint that DeepMind's package `gemma` loads with `gm.ckpts.load_params`.

The files are written with the package `tensorstore`. Orbax itself needs JAX, and all arrays in
memory at once.
"""

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from keras_gemma import progress
from keras_gemma.config import GemmaConfig
from keras_gemma.storage.files import write_json
from keras_gemma.storage.orbax import layout
from keras_gemma.storage.orbax.arrays import import_tensorstore
from keras_gemma.storage.tensor_streaming import TensorSpec
from keras_gemma.text.tokenizer import check_vocabulary_size

MAX_CHUNK_BYTES = 64 << 20
"""Maximum size of a chunk of an array."""
MAX_WAITING_BYTES = 128 << 20
"""Size of the numbers that wait for a commit, beyond which they are committed."""

_KEY_OF_DICTIONARY = 2
"""Orbax's number for a key of a dictionary."""


def write(task: Any, folder: Path, max_shard_bytes: int) -> None:
    """Writes `task` to the empty `folder`, with its config.json and vocabulary.

    Weights keep the dtype of the model's variables and are in memory one at a time. Data
    files have about `max_shard_bytes` at most.
    """
    config = task.backbone.config
    _check(config)
    tensorstore = import_tensorstore("Writing")
    if task.preprocessor is not None:
        tokenizer = task.preprocessor.tokenizer
        check_vocabulary_size(tokenizer, config.vocabulary_size)
        (folder / layout.VOCABULARY).write_bytes(tokenizer.proto)
    # The arrays do not hold the settings. `keras_preset` reads this file.
    write_json(folder / layout.CONFIG, {"class_name": "GemmaBackbone", "config": config.to_dict()})
    weights = task.backbone.named_weights()
    specs = layout.tensor_specs(config, layout.transposes_gating(config))
    arrays = {layout.array_and_part(spec.name)[0]: spec for spec in specs.values()}
    dtype = np.dtype(weights["token_embedding"].plain_dtype)
    writer = _Writer(tensorstore, folder, max_shard_bytes)
    writer.create({name: layout.stored_shape(spec) for name, spec in arrays.items()}, dtype)
    with progress.bar("Saving", sum(weight.plain_bytes for weight in weights.values())) as advance:
        for name, weight in weights.items():
            writer.write(specs[name], weight.numpy())
            advance(weight.plain_bytes)
        writer.commit()
    write_json(folder / layout.METADATA, _tree(list(arrays)))


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


class _Writer:
    """Writes arrays to the database of a checkpoint.

    Each commit adds files, so that small writes are committed together.
    """

    def __init__(self, tensorstore: ModuleType, folder: Path, max_file_bytes: int) -> None:
        self.tensorstore = tensorstore
        self.database = {
            "driver": "ocdbt",
            "base": {"driver": "file", "path": f"{folder.resolve()}/"},
            "target_data_file_size": max_file_bytes,
        }
        self.max_chunk_bytes = min(MAX_CHUNK_BYTES, max_file_bytes)
        self.arrays: dict[str, Any] = {}
        self.transaction = tensorstore.Transaction()
        self.waiting_bytes = 0

    def create(self, shapes: dict[str, tuple[int, ...]], dtype: np.dtype) -> None:
        """Creates all arrays, in chunks of rows."""
        context = self.tensorstore.Context()
        futures = {
            name: self.tensorstore.open(
                {
                    "driver": "zarr",
                    "kvstore": {**self.database, "path": f"{name.replace('/', '.')}/"},
                    "metadata": {
                        "shape": shape,
                        "chunks": self._chunks(shape, dtype),
                        "dtype": dtype.name if dtype.name == "bfloat16" else dtype.str,
                        "compressor": None,
                    },
                    "store_data_equal_to_fill_value": True,
                },
                create=True,
                context=context,
            )
            for name, shape in shapes.items()
        }
        self.arrays = {name: future.result() for name, future in futures.items()}

    def write(self, spec: TensorSpec, logical: np.ndarray) -> None:
        """Writes a weight, or the part of an array that holds it."""
        name, part = layout.array_and_part(spec.name)
        numbers = spec.to_stored(logical)
        array = self.arrays[name]
        chunk = array.chunk_layout.write_chunk.shape[-numbers.ndim]
        view = array if part is None else array[part]
        step = chunk * max(1, self.max_chunk_bytes // (chunk * numbers[0].nbytes))
        for start in range(0, len(numbers), step):
            self._write(view, start, numbers[start : start + step])
        unused = view.shape[0] - len(numbers)
        if unused:  # repeats <pad>, which a model does not predict
            row = np.broadcast_to(numbers[0], (unused, *numbers.shape[1:]))
            self._write(view, len(numbers), row)

    def commit(self) -> None:
        """Stores all numbers that wait."""
        self.transaction.commit_sync()
        self.transaction = self.tensorstore.Transaction()
        self.waiting_bytes = 0

    def _write(self, view: Any, start: int, rows: np.ndarray) -> None:
        view.with_transaction(self.transaction)[start : start + len(rows)].write(rows).result()
        self.waiting_bytes += rows.nbytes
        if self.waiting_bytes > MAX_WAITING_BYTES:
            self.commit()

    def _chunks(self, shape: tuple[int, ...], dtype: np.dtype) -> list[int]:
        *outer, rows, length = (1, *shape)
        count = math.ceil(rows * length * dtype.itemsize / self.max_chunk_bytes)
        # About equal: Zarr fills up the last chunk.
        return [*(1 for _ in outer), math.ceil(rows / count), length][-len(shape) :]


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
