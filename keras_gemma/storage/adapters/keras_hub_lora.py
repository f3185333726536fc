"""Reads and writes KerasHub's `.lora.h5`: A and B of layers that are identified by number.

    lora/vars/rank                 one for all
    lora/<i>/vars/lora_kernel_a    of the i-th layer that has weights, as `_numbers` counts them
    lora/<i>/vars/lora_kernel_b

KerasHub's matrices and their A have an axis of heads: query, key and value have an A `[D, r]` for
each head and a B `[r, H]` that all heads share. As matrices `[out, in]` with n heads, that is a
product of rank n * r:

    A [n * r, D]     the heads' matrices stacked
    B [n * H, n * r]     B^T for each head on the diagonal, 0 elsewhere

Equal rows of A are joined, so an adapter written here is read back unchanged, with its scale in B.
The scale of KerasHub's own adapters is always 1.
"""

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from keras_gemma.config import GemmaConfig
from keras_gemma.lora.adapters import Arrays, check_finite
from keras_gemma.lora.config import MATRICES, Lora
from keras_gemma.storage.files import Kind, check_target, local_path, scratch_folder
from keras_gemma.storage.tensor_streaming import report_problems

ENDING = ".lora.h5"
NAME = "default"


def is_lora_file(path: Path) -> bool:
    """Returns True if `path` is an H5 file with an adapter."""
    if not path.is_file() or not h5py.is_hdf5(path):
        return False
    with h5py.File(path) as file:
        return "lora" in file


LORA_FILES = Kind("files of adapters", is_lora_file, is_folder=False)
"""Files that saving an adapter may replace."""


def save_lora_weights(backbone: Any, filepath: str | Path, overwrite: bool = False) -> None:
    """Implements `GemmaBackbone.save_lora_weights`."""
    path = _path(filepath)
    check_target(path, LORA_FILES, overwrite, "filepath")
    name = backbone.adapters.active_name()
    arrays, lora = backbone.adapters.arrays(name), backbone.adapters.configs[name]
    check_finite(arrays, f"The adapter {name!r}")
    config, numbers = backbone.config, _numbers(backbone.config)
    theirs = {}
    for matrix, (a, b) in arrays.items():
        theirs[matrix] = _to_theirs(a, b * np.float32(lora.scale(matrix)), _heads(matrix, config))
    rank = max(b.shape[0] for _, b in theirs.values())
    with scratch_folder(path.resolve(), "filepath") as folder:
        with h5py.File(folder / path.name, "w") as file:
            file["lora/vars/rank"] = rank
            for matrix, (a, b) in theirs.items():
                missing = rank - b.shape[0]
                group = file.create_group(f"lora/{numbers[matrix]}/vars")
                wide = [(0, 0)] * (a.ndim - 1) + [(0, missing)]
                shape, _ = _shapes(matrix, rank, config)
                group["lora_kernel_a"] = np.pad(a, wide).reshape(shape)
                group["lora_kernel_b"] = np.pad(b, [(0, missing), (0, 0)])
        (folder / path.name).replace(path)


def load_lora_weights(backbone: Any, filepath: str | Path) -> None:
    """Implements `GemmaBackbone.load_lora_weights`."""
    path = _path(filepath)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Pass a file that `backbone.save_lora_weights` wrote."
        )
    adapters = backbone.adapters
    if NAME not in adapters.configs or adapters.merged:
        adapters.check_name(NAME)
    arrays = _read(path, backbone.config)
    check_finite(arrays, str(path))
    dropout, dtype = 0.0, "float32"
    if NAME in adapters.configs:
        dropout, dtype = adapters.configs[NAME].dropout, adapters.configs[NAME].dtype
        adapters.delete(NAME)
    sizes = {matrix: (len(a), float(len(a))) for matrix, (a, _) in arrays.items()}
    adapters.add(NAME, Lora(sizes, dropout, dtype=dtype), arrays)


def _path(filepath: str | Path) -> Path:
    path = local_path(filepath, "filepath")
    if not path.name.endswith(ENDING):
        raise ValueError(
            f"The filename must end in {ENDING!r}. Received: filepath={str(filepath)!r}"
        )
    return path


def _numbers(config: GemmaConfig) -> dict[str, int]:
    """Returns KerasHub's number of each matrix. It counts the layers of a block from its end."""
    block = ["block", "down", "up", "gate"]
    block += ["norm"] * (1 + config.use_post_ffw_norm)
    block += ["attention", "output", *["norm"] * (2 * config.use_query_key_norm)]
    block += ["value", "key", "query"]
    block += ["norm"] * (1 + config.use_post_attention_norm)
    return {
        f"layers.{layer}.{part}": 1 + layer * len(block) + i
        for layer in range(config.num_layers)
        for i, part in enumerate(block)
        if part in MATRICES
    }


def _heads(matrix: str, config: GemmaConfig) -> int | None:
    """Returns the number of heads on the out axis of a matrix, or `None` if it has no heads."""
    if matrix.endswith(".query"):
        return config.num_query_heads
    return config.num_key_value_heads if matrix.endswith((".key", ".value")) else None


def _shapes(matrix: str, rank: int, config: GemmaConfig) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Returns the shapes of KerasHub's A and B."""
    out, length = config.weight_shapes()[matrix]
    heads = _heads(matrix, config)
    if heads is not None:
        return (heads, length, rank), (rank, out // heads)
    if matrix.endswith(".output"):
        return (config.num_query_heads, config.head_dim, rank), (rank, out)
    return (length, rank), (rank, out)


def _read(path: Path, config: GemmaConfig) -> Arrays:
    """Reads A and B of each matrix in this package's layout."""
    names = {str(number): matrix for matrix, number in _numbers(config).items()}
    arrays, problems = {}, []
    try:
        with h5py.File(path, "r") as file:
            group = file["lora"]
            rank = int(group["vars/rank"][()])
            for number in (key for key in group if key != "vars"):
                pair = [group[f"{number}/vars/lora_kernel_{part}"][()] for part in "ab"]
                if number not in names:
                    problems.append(f"layer {number} has no matrix that LoRA supports here")
                    continue
                expected = _shapes(names[number], rank, config)
                if tuple(array.shape for array in pair) == expected:
                    heads = _heads(names[number], config)
                    arrays[names[number]] = _to_ours(*(p.astype("float32") for p in pair), heads)
                else:
                    shapes = " and ".join(str(array.shape) for array in pair)
                    expected_shapes = " and ".join(map(str, expected))
                    problems.append(f"{names[number]} is {shapes}, expected {expected_shapes}")
    except (OSError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read as a file of KerasHub's `save_lora_weights`: {error}. Save the "
            "adapter again."
        ) from error
    if not arrays and not problems:
        problems = ["it has no layers"]
    report_problems(
        problems,
        f"The adapter in {path} does not fit this model",
        "Load it onto the model that it was trained on",
    )
    return {matrix: arrays[matrix] for matrix in config.weight_shapes() if matrix in arrays}


def _to_ours(a: np.ndarray, b: np.ndarray, heads: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Converts KerasHub's A and B to `[r, in]` and `[out, r]`."""
    rank = b.shape[0]
    if heads is None:
        return np.ascontiguousarray(a.reshape(-1, rank).T), np.ascontiguousarray(b.T)
    rows = a.swapaxes(1, 2).reshape(heads * rank, -1)
    columns = np.kron(np.eye(heads, dtype="float32"), b.T)
    rows, indices = np.unique(rows, axis=0, return_inverse=True)
    together = np.zeros((len(columns), len(rows)), "float32")
    np.add.at(together.T, indices.reshape(-1), columns.T)
    used = rows.any(axis=1) if rows.any() else slice(0, 1)
    return np.ascontiguousarray(rows[used]), np.ascontiguousarray(together[:, used])


def _to_theirs(a: np.ndarray, b: np.ndarray, heads: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of `_to_ours`, of A `[r, in]` and B `[out, r]` that includes the scale.

    With several heads, each head has its own rows of B, from n * r for head n. Its A is 0 at the
    rows of other heads.
    """
    if heads is None:
        return a.T, b.T  # the caller adds the axis of heads of `output`
    rank, length = a.shape
    theirs = np.zeros((heads, length, heads, rank), "float32")
    theirs[np.arange(heads), :, np.arange(heads)] = a.T
    parts = b.reshape(heads, -1, rank).swapaxes(1, 2)
    return theirs.reshape(heads, length, heads * rank), parts.reshape(heads * rank, -1)
