"""Checkpoint of a training run: variables and metadata in one file, written atomically.

Knows nothing about the meaning of the variables.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from keras import ops
from safetensors import SafetensorError, safe_open

from keras_gemma.storage.hugging_face.safetensors import save_file

METADATA_KEY = "facts"
"""Key of the JSON metadata in the file's header."""


def write_checkpoint(path: Path, variables: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Writes a checkpoint. If this fails, a previous file at `path` is unchanged.

    Args:
        path: Path of the safetensors file.
        variables: Keras variables by name.
        metadata: Values that JSON supports.

    Raises:
        OSError: If the file cannot be written.
    """
    arrays = {}
    for name, variable in variables.items():
        array = np.asarray(ops.convert_to_numpy(variable.value), order="C")
        arrays[name] = array.view("uint16") if array.dtype.name == "bfloat16" else array
    temporary = path.with_name(path.name + ".new")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(arrays, temporary, metadata={METADATA_KEY: json.dumps(dict(metadata))})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as problem:
        temporary.unlink(missing_ok=True)
        state, remedy = "", "run the same call again to start over"
        if path.exists():
            state, remedy = "; the previous one is intact", "run the same call again to continue"
        raise OSError(
            f"The checkpoint {path} could not be written{state}: {problem}. Free disk space, and "
            f"{remedy}."
        ) from problem


def read_metadata(path: Path) -> dict[str, Any]:
    """Reads the metadata of a checkpoint.

    Raises:
        ValueError: If the file is not a checkpoint.
    """
    try:
        with safe_open(path, "np") as file:
            return json.loads((file.metadata() or {})[METADATA_KEY])
    except (SafetensorError, KeyError) as problem:
        raise ValueError(
            f"{path} is not a valid checkpoint of a run: {problem}. Choose another folder."
        ) from problem


def read_variables(path: Path, variables: Mapping[str, Any]) -> None:
    """Assigns the values in a checkpoint to `variables`.

    Raises:
        ValueError: If the file has other names or shapes.
    """
    with safe_open(path, "np") as file:
        # Older checkpoints name the states of random generators "chance".
        stored = {name.replace("chance.", "rng.", 1): name for name in file.keys()}  # noqa: SIM118
        if set(stored) != set(variables):
            differing = sorted(set(stored) ^ set(variables))
            raise ValueError(
                f"{path} has other variables than the model: {', '.join(differing[:6])}. Continue "
                "with the model of the interrupted run, or choose another folder."
            )
        for name, variable in variables.items():
            array = file.get_tensor(stored[name])
            if array.shape != tuple(variable.shape):
                raise ValueError(
                    f"{path} has {name!r} with shape {array.shape}, but the model has "
                    f"{tuple(variable.shape)}. Continue with the model of the interrupted run."
                )
            variable.assign(array.view("bfloat16") if str(variable.dtype) == "bfloat16" else array)
