"""Where a run stands, in one file that is whole or not there.

Knows variables and numbers, and not what they are trained for.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from keras import ops
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


def write_checkpoint(path: Path, variables: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write variables and facts to `path`, beside it first, so that the file before stays whole.

    Args:
        path: the file, a safetensors file.
        variables: Keras variables by names of their own.
        facts: what JSON can say.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    arrays = {}
    for name, variable in variables.items():
        array = np.asarray(ops.convert_to_numpy(variable.value), order="C")
        arrays[name] = array.view("uint16") if array.dtype.name == "bfloat16" else array
    beside = path.with_name(path.name + ".new")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(arrays, beside, metadata={"facts": json.dumps(dict(facts))})
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, SafetensorError) as problem:
        beside.unlink(missing_ok=True)
        kept, again = "", "begins anew"
        if path.exists():
            kept, again = "; the one before is whole", "goes on from that"
        raise OSError(
            f"The checkpoint {path} could not be written{kept}: {problem}. Make room, and run the "
            f"same again: it {again}."
        ) from problem


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of a checkpoint.

    Raises:
        ValueError: the file is none.
    """
    try:
        with safe_open(path, "np") as file:
            return json.loads((file.metadata() or {})["facts"])
    except (SafetensorError, KeyError) as problem:
        raise ValueError(
            f"{path} is no checkpoint of a run: {problem}. Name another folder."
        ) from problem


def read_variables(path: Path, variables: Mapping[str, Any]) -> None:
    """Give `variables` the values they had.

    Raises:
        ValueError: the file has other names or shapes.
    """
    with safe_open(path, "np") as file:
        if set(file.keys()) != set(variables):
            differing = sorted(set(file.keys()) ^ set(variables))
            raise ValueError(
                f"{path} holds other variables than the model trains: {', '.join(differing[:6])}. "
                "Go on with the model that the run began with, or name another folder."
            )
        for name, variable in variables.items():
            array = file.get_tensor(name)
            if array.shape != tuple(variable.shape):
                raise ValueError(
                    f"{path} has {name!r} of shape {array.shape}, and the model of "
                    f"{tuple(variable.shape)}. Go on with the model that the run began with."
                )
            variable.assign(array.view("bfloat16") if str(variable.dtype) == "bfloat16" else array)
