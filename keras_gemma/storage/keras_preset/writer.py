"""Writes KerasHub's preset folder, so that KerasHub and this package load it alike.

Knows only the format: `formats.py` and `presets.py` replace the target folder when the new one is
complete.
"""

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

from keras_gemma import progress
from keras_gemma.backend import quantized
from keras_gemma.config import GemmaConfig
from keras_gemma.storage.files import write_json
from keras_gemma.storage.keras_preset import layout
from keras_gemma.storage.sharding import plan_shards
from keras_gemma.storage.tensor_streaming import QuantizedTensorSpec, TensorSpec


def write(task: Any, folder: Path, max_shard_bytes: int) -> None:
    """Writes `task`, a `GemmaCausalLM`, to the empty `folder`, also for KerasHub."""
    check_backbone(task.backbone, max_shard_bytes)
    family = task.backbone.config.family
    config = {
        "backbone": backbone_object(task.backbone),
        "preprocessor": None,
        "name": task.name,
    }
    if task.preprocessor is not None:
        config["preprocessor"] = preprocessor_object(task.preprocessor, family)
        write_preprocessor(folder, task.preprocessor, family)
    write_json(folder / layout.TASK, _object(f"{family}CausalLM", config))
    write_backbone(folder, task.backbone, max_shard_bytes)


def check_backbone(backbone: Any, max_shard_bytes: int) -> None:
    """Checks that `write_backbone` can write `backbone`, before anything is written."""
    backbone.adapters.check_plain()
    plan_shards(_sizes(backbone), max_shard_bytes)


def write_backbone(folder: Path, backbone: Any, max_shard_bytes: int) -> None:
    write_json(folder / layout.CONFIG, backbone_object(backbone))
    _write_metadata(folder, backbone)
    _write_weights(folder, backbone, max_shard_bytes)


def write_preprocessor(folder: Path, preprocessor: Any, family: str) -> None:
    """Writes a preprocessor and its tokenizer. `family` is `GemmaConfig.family`."""
    write_tokenizer(folder, preprocessor.tokenizer, family)
    write_json(folder / layout.PREPROCESSOR, preprocessor_object(preprocessor, family))


def write_tokenizer(folder: Path, tokenizer: Any, family: str) -> None:
    """Writes a tokenizer. `family` is `GemmaConfig.family`."""
    write_json(folder / layout.TOKENIZER, tokenizer_object(tokenizer, family))
    assets = (folder / layout.VOCABULARY).parent
    assets.mkdir(parents=True)
    tokenizer.save_assets(assets)


def backbone_object(backbone: Any) -> dict[str, Any]:
    """Serializes `backbone` as KerasHub does.

    A backbone that is quantized, or that KerasHub cannot express, gets a class name that KerasHub
    does not know: KerasHub would silently ignore an unknown argument.
    """
    config, layer_keys = backbone.config, _layer_keys(backbone)
    own = {name: value for name, value in config.to_dict().items() if name != "context_length"}
    if backbone.quantization is not None:
        quantization = {"quantization": backbone.quantization.to_dict()}
        return _object(layout.QUANTIZED_BACKBONE, {**layer_keys, **own, **quantization})
    if not config.is_in_keras_hub:
        return _object(layout.CUSTOM_BACKBONE, {**layer_keys, **own})
    return _object(f"{config.family}Backbone", {**layer_keys, **config.to_keras_hub()})


def tokenizer_object(tokenizer: Any, family: str) -> dict[str, Any]:
    config = {
        "config_file": layout.TOKENIZER,
        "proto": None,
        "sequence_length": tokenizer.sequence_length,
        "add_bos": tokenizer.add_bos,
        "add_eos": tokenizer.add_eos,
    }
    if family == "Gemma3":
        config["has_vision_tokens"] = False
    return _object(f"{family}Tokenizer", {**_layer_keys(tokenizer), **config})


def preprocessor_object(preprocessor: Any, family: str) -> dict[str, Any]:
    config = {
        "tokenizer": tokenizer_object(preprocessor.tokenizer, family),
        "config_file": layout.PREPROCESSOR,
        "sequence_length": preprocessor.sequence_length,
        "add_start_token": preprocessor.add_start_token,
        "add_end_token": preprocessor.add_end_token,
    }
    return _object(f"{family}CausalLMPreprocessor", {**_layer_keys(preprocessor), **config})


def _write_metadata(folder: Path, backbone: Any) -> None:
    """Writes what KerasHub shows about a preset, and the values that only this package knows.

    These are the context length and the quantization error of each weight. They are not in
    config.json because KerasHub refuses arguments that its backbone does not have.
    """
    config: GemmaConfig = backbone.config
    content: dict[str, Any] = {
        "keras_version": keras.version(),
        "keras_hub_version": layout.KERAS_HUB_VERSION,
        "parameter_count": config.parameter_count,
        "date_saved": datetime.datetime.now().strftime("%Y-%m-%d@%H:%M:%S"),
        "tasks": ["CausalLM"],
        "context_length": config.context_length,
    }
    if backbone.quantization is not None:
        weights = backbone.named_weights().items()
        errors = {name: weight.relative_error for name, weight in weights if weight.kind != "norm"}
        content["relative_errors"] = {k: v for k, v in errors.items() if v is not None}
    write_json(folder / layout.METADATA, content)


def _write_weights(folder: Path, backbone: Any, max_shard_bytes: int) -> None:
    """Writes the weights one at a time: one H5 file, or shards of `max_shard_bytes`."""
    sizes = _sizes(backbone)
    plan = plan_shards(sizes, max_shard_bytes)
    specs = layout.tensor_specs(backbone.config, folder, backbone.quantization)
    weights = backbone.named_weights()
    weight_map = {}
    with progress.bar("Saving", sum(sizes.values())) as advance:
        for number, names in enumerate(plan):
            file_name = layout.WEIGHTS if len(plan) == 1 else layout.SHARD.format(number)
            with h5py.File(folder / file_name, "w") as file:
                for name in names:
                    for path, array in _arrays(weights[name], specs[name]):
                        dataset = file.create_dataset(path, data=np.ascontiguousarray(array))
                        if array.dtype.name == "bfloat16":  # H5 stores two opaque bytes
                            dataset.attrs["dtype"] = "bfloat16"  # as in Keras
                        weight_map["/" + path.rsplit("/", 1)[0]] = file_name
                    advance(sizes[name])
    if len(plan) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / layout.WEIGHTS_INDEX, index)


def _arrays(
    weight: Any, spec: TensorSpec | QuantizedTensorSpec
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the arrays that a weight is stored as, and their paths."""
    if isinstance(spec, TensorSpec):
        yield spec.name, spec.to_stored(weight.numpy())
        return
    plain = weight.plain_form()
    if weight.bits == 4:
        plain = quantized.pack(plain, weight.kind, 4)
    for part, array in zip(spec.parts, plain, strict=True):
        if part is not None:
            yield part.name, array


def _sizes(backbone: Any) -> dict[str, int]:
    return {name: weight.bytes for name, weight in backbone.named_weights().items()}


def _object(class_name: str, config: dict[str, Any]) -> dict[str, Any]:
    if class_name in (layout.QUANTIZED_BACKBONE, layout.CUSTOM_BACKBONE):
        package = module = "keras_gemma"
    else:
        package = "keras_hub"
        family = "Gemma3" if class_name.startswith("Gemma3") else "Gemma"
        ending = layout.MODULES[class_name.removeprefix(family)]
        module = f"keras_hub.src.models.{family.lower()}.{family.lower()}_{ending}"
    return {
        "module": module,
        "class_name": class_name,
        "config": config,
        "registered_name": f"{package}>{class_name}",
    }


def _layer_keys(layer: Any) -> dict[str, Any]:
    """Returns the keys of every Keras layer's config: name, trainable and dtype policy."""
    policy = layer.dtype_policy
    if type(policy) is keras.DTypePolicy:  # Keras's function imports TensorFlow on every backend
        dtype = {
            "module": "keras",
            "class_name": "DTypePolicy",
            "config": policy.get_config(),
            "registered_name": None,
        }
    else:
        dtype = keras.dtype_policies.serialize(policy)
    return {"name": layer.name, "trainable": layer.trainable, "dtype": dtype}
