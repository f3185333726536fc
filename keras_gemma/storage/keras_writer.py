"""KerasHub's preset folder, written, so that KerasHub and this package load it alike.

Writes into a folder beside the target, which takes the target's place when it is whole. Knows
the format alone: what a model consists of is decided in `presets.py`.
"""

import datetime
import fnmatch
import math
import re
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

from keras_gemma.config import GemmaConfig
from keras_gemma.storage import keras_layout as layout
from keras_gemma.storage.files import write_json

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


def parse_size(size: int | float | str) -> int:
    """Bytes in `"10GB"`, `"512MiB"` or a number of bytes.

    Raises:
        ValueError: not a size, or not positive.
    """
    if isinstance(size, (int, float)) and not isinstance(size, bool) and size > 0:
        return int(size)
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMG]?i?B)\s*", str(size), re.IGNORECASE)
    if match is None or not float(match[1]) > 0:
        raise ValueError(
            "`max_shard_size` must be a number of bytes, or a string such as '10GB'. "
            f"Received: max_shard_size={size!r}"
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def is_weights_file(name: str) -> bool:
    """Whether `name`, relative to the folder, holds weights or their index."""
    return name in (layout.WEIGHTS, layout.WEIGHTS_INDEX) or fnmatch.fnmatch(
        name, layout.SHARD_PATTERN
    )


def backbone_object(backbone: Any) -> dict[str, Any]:
    """`backbone` as KerasHub serialises it."""
    return _object("GemmaBackbone", {**_layer_keys(backbone), **backbone.config.to_dict()})


def tokenizer_object(tokenizer: Any) -> dict[str, Any]:
    """`tokenizer` as KerasHub serialises it; the vocabulary is an asset of its own."""
    config = {"config_file": layout.TOKENIZER, "proto": None}
    config |= {"sequence_length": None, "add_bos": False, "add_eos": False}
    given = tokenizer.get_config()
    config |= {key: given[key] for key in config if key in given and key != "proto"}
    return _object("GemmaTokenizer", {**_layer_keys(tokenizer), **config})


def preprocessor_object(preprocessor: Any) -> dict[str, Any]:
    """`preprocessor` as KerasHub serialises it, its tokenizer within."""
    given = preprocessor.get_config()
    keys = ("sequence_length", "add_start_token", "add_end_token")
    config = {
        "tokenizer": tokenizer_object(preprocessor.tokenizer),
        "config_file": layout.PREPROCESSOR,
        **{key: given[key] for key in keys},
    }
    return _object("GemmaCausalLMPreprocessor", {**_layer_keys(preprocessor), **config})


def task_object(task: Any) -> dict[str, Any]:
    """`task` as KerasHub serialises it, backbone and preprocessor within."""
    preprocessor = task.preprocessor
    config = {
        "backbone": backbone_object(task.backbone),
        "preprocessor": None if preprocessor is None else preprocessor_object(preprocessor),
        "name": task.name,
    }
    return _object("GemmaCausalLM", config)


def write_vocabulary(folder: Path, tokenizer: Any) -> None:
    """Write the SentencePiece vocabulary of `tokenizer`."""
    assets = (folder / layout.VOCABULARY).parent
    assets.mkdir(parents=True)
    tokenizer.save_assets(assets)


def write_metadata(folder: Path, config: GemmaConfig) -> None:
    """Write what KerasHub shows of a preset without opening it."""
    content = {
        "keras_version": keras.version(),
        "keras_hub_version": layout.KERAS_HUB_VERSION,
        "parameter_count": config.parameter_count,
        "date_saved": datetime.datetime.now().strftime("%Y-%m-%d@%H:%M:%S"),
        "tasks": ["CausalLM"],
    }
    write_json(folder / layout.METADATA, content)


def plan_shards(sizes: dict[str, int], max_shard_size: int) -> list[list[str]]:
    """Which weights go into which file, in their order: one list a file.

    Args:
        sizes: bytes of each weight.
        max_shard_size: bytes that a file may hold.

    Raises:
        ValueError: one weight alone is larger than a file may be.
    """
    name, largest = max(sizes.items(), key=lambda item: item[1])
    if largest > max_shard_size:
        raise ValueError(
            f"`max_shard_size` is smaller than the largest tensor ({name}: {largest} bytes). "
            f"Received: {max_shard_size} bytes. A number counts bytes; '10GB' is a string."
        )
    plan: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if filled + size > max_shard_size:
            plan.append([])
            filled = 0
        plan[-1].append(name)
        filled += size
    return plan


def weight_sizes(backbone: Any) -> dict[str, int]:
    """Bytes of each weight of `backbone` in its own dtype."""
    return {
        name: math.prod(weight.shape) * _ELEMENT_BYTES[str(weight.dtype)]
        for name, weight in backbone.named_weights().items()
    }


def write_weights(folder: Path, backbone: Any, max_shard_size: int) -> None:
    """Write the weights one at a time: one H5 file, or shards of `max_shard_size` bytes."""
    sizes = weight_sizes(backbone)
    plan = plan_shards(sizes, max_shard_size)
    places = layout.h5_places(backbone.config)
    weights = backbone.named_weights()
    weight_map = {}
    for number, names in enumerate(plan):
        file_name = layout.WEIGHTS if len(plan) == 1 else layout.SHARD.format(number)
        with h5py.File(folder / file_name, "w") as file:
            for name in names:
                place = places[name]
                _write_tensor(file, place.name, place.to_stored(weights[name].numpy()))
                weight_map["/" + place.name.rsplit("/", 1)[0]] = file_name
    if len(plan) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / layout.WEIGHTS_INDEX, index)


def _write_tensor(file: h5py.File, path: str, array: np.ndarray) -> None:
    """H5 has no bfloat16: Keras stores two opaque bytes an element, and says so beside it."""
    dataset = file.create_dataset(path, data=np.ascontiguousarray(array))
    if array.dtype.name == "bfloat16":
        dataset.attrs["dtype"] = "bfloat16"


def _object(class_name: str, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "module": layout.MODULES[class_name],
        "class_name": class_name,
        "config": config,
        "registered_name": f"keras_hub>{class_name}",
    }


def _layer_keys(layer: Any) -> dict[str, Any]:
    """Name, trainability and dtype policy, as every Keras layer's config begins."""
    return {
        "name": layer.name,
        "trainable": layer.trainable,
        "dtype": keras.dtype_policies.serialize(layer.dtype_policy),
    }
