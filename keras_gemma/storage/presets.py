"""Loads objects from a preset's folder and saves objects into one.

Decides which format a folder has and what each class is built from. Knows no file format
(`keras_preset/`, `hugging_face/`) and no task: classes are passed in.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

from keras_gemma.backend import uninitialized
from keras_gemma.catalogue import find, presets
from keras_gemma.config import GemmaConfig
from keras_gemma.quantization import QuantizationConfig, to_config
from keras_gemma.storage import tensor_streaming
from keras_gemma.storage.arguments import check_arguments, kind_of, pop_arguments
from keras_gemma.storage.files import local_path, read_json, replacing, within, write_json
from keras_gemma.storage.formats import check_no_hugging_face, is_model_file
from keras_gemma.storage.hub.locate import resolve
from keras_gemma.storage.hugging_face import reader as hugging_face
from keras_gemma.storage.hugging_face.tokenizer_json import is_tokenizer_json
from keras_gemma.storage.keras_preset import layout
from keras_gemma.storage.keras_preset import reader as keras_preset
from keras_gemma.storage.keras_preset import writer as keras_preset_writer
from keras_gemma.storage.sharding import parse_size, plan_shards, weight_sizes

CONFIG = "config.json"
READ_SUFFIXES = (".json", ".h5", ".safetensors", ".model", ".spm")
"""Suffixes of the files of a preset that may be read."""
MAX_LISTED_NAMES = 8
"""Maximum number of file names listed in a message."""


def load(
    cls: type,
    preset: str | Path,
    load_weights: bool = True,
    dtype: Any = None,
    **kwargs: Any,
) -> Any:
    """Builds an object of `cls` from a preset.

    Args:
        cls: A backbone, tokenizer, preprocessor or task class, or a subclass of one.
        preset: A built-in name, a `kaggle://` or `hf://` handle, or a directory.
        load_weights: If False, weights keep their initial values and no weights file is needed.
        dtype: Dtype or dtype policy of the model. `None` uses the policy of a Keras preset or a
            built-in name, and Keras's global policy for a Hugging Face checkpoint.
        **kwargs: Arguments of `cls`, or of its parts, that override the preset's.

    Raises:
        ValueError: If there is no such preset, an argument is unknown, or the files do not fit.
        FileNotFoundError: If a directory or a file in it is missing.
        TypeError: If `cls` is not part of a preset.
    """
    makers = {
        "backbone": _make_backbone,
        "tokenizer": _make_tokenizer,
        "preprocessor": _make_preprocessor,
        "task": _make_task,
    }
    kind = kind_of(cls)
    check_arguments(cls, load_weights, dtype, kwargs)
    text = kind in ("tokenizer", "preprocessor") or (
        kind == "task" and "preprocessor" not in kwargs
    )
    model = kind == "backbone" or (kind == "task" and "backbone" not in kwargs)
    folder = resolve(preset, text=text, weights=model and load_weights)
    if dtype is None and model and isinstance(preset, str) and preset in presets():
        dtype = presets()[preset].dtype  # the same for both hubs
    if model and (published := find(preset)) is not None:  # not in KerasHub's files
        kwargs.setdefault("context_length", published.config.context_length)
    _check_links(folder)
    return makers[kind](cls, folder, reader_of(folder), load_weights, dtype, kwargs)


def save(item: Any, preset_dir: str | Path, max_shard_size: int | str = "10GB") -> None:
    """Writes `item` to `preset_dir` as a preset that KerasHub reads too.

    Files of an earlier preset are replaced together when all new files are complete. Files that
    `item` does not contain are kept, such as the tokenizer when a backbone is saved. A task
    replaces a Hugging Face checkpoint; a part of a task is refused there.

    If the process dies during the final renames, `preset_dir` may be missing. Its files are then
    complete in a hidden folder next to it, such as `.my_gemma.k3x9/old`, which can be renamed.

    Args:
        item: A backbone, tokenizer, preprocessor or task.
        preset_dir: The folder, created if it does not exist.
        max_shard_size: Maximum size of a weights file, in bytes or as `"10GB"`.

    Raises:
        ValueError: If `preset_dir` is a file, the current directory, a URL or not writable; if it
            holds a Hugging Face checkpoint and `item` is not a task; if a weight is larger than
            `max_shard_size`; or if a quantized model has an active adapter.
        TypeError: If `item` is not part of a preset, or `preset_dir` is neither a string nor a
            path.
    """
    kind = kind_of(type(item))
    preset_dir = local_path(preset_dir, "preset_dir")
    limit = parse_size(max_shard_size)
    backbone = {"task": getattr(item, "backbone", None), "backbone": item}.get(kind)
    preprocessor = {"task": getattr(item, "preprocessor", None), "preprocessor": item}.get(kind)
    tokenizer = item if kind == "tokenizer" else getattr(preprocessor, "tokenizer", None)
    if backbone is not None:
        backbone.adapters.check_plain()
        plan_shards(weight_sizes(backbone), limit)
    if kind != "task":
        check_no_hugging_face(preset_dir)

    def stale(name: str) -> bool:
        if kind == "task":
            return is_model_file(name)
        weights = keras_preset_writer.is_weights_file(name) and "/" not in name
        return backbone is not None and (name == layout.TASK or weights)

    with replacing(preset_dir, stale) as folder:
        if kind == "task":
            write_json(folder / layout.TASK, keras_preset_writer.task_object(item))
        if tokenizer is not None:
            write_json(folder / layout.TOKENIZER, keras_preset_writer.tokenizer_object(tokenizer))
            keras_preset_writer.write_vocabulary(folder, tokenizer)
        if preprocessor is not None:
            content = keras_preset_writer.preprocessor_object(preprocessor)
            write_json(folder / layout.PREPROCESSOR, content)
        if backbone is not None:
            write_json(folder / layout.CONFIG, keras_preset_writer.backbone_object(backbone))
            keras_preset_writer.write_metadata(folder, backbone)
            keras_preset_writer.write_weights(folder, backbone, limit)


def reader_of(folder: Path) -> ModuleType:
    """Returns the module that reads the format of `folder`."""
    path = folder / CONFIG
    if not path.is_file():
        if (folder / layout.VOCABULARY).is_file():
            return keras_preset
        if (folder / hugging_face.VOCABULARY).is_file():
            return hugging_face
        tokenizer = folder / hugging_face.TOKENIZER
        if tokenizer.is_file() and is_tokenizer_json(read_json(tokenizer)):
            return hugging_face
        raise ValueError(
            f"{folder} is not a preset: looked for {CONFIG}, {layout.VOCABULARY}, "
            f"{hugging_face.VOCABULARY} and Hugging Face's tokenizer.json, but found none. "
            f"It holds {_list_names(folder)}. Pass a folder that `lm.save_to_preset(...)` wrote or "
            "a Hugging Face checkpoint."
        )
    content = read_json(path)
    if "registered_name" in content or "class_name" in content:
        return keras_preset
    if "model_type" in content:
        return hugging_face
    raise ValueError(
        f"{path} has an unknown format: looked for `registered_name` or `class_name` (Keras) and "
        f"`model_type` (Hugging Face). It has the keys {', '.join(sorted(content)) or 'none'}."
    )


def _list_names(folder: Path) -> str:
    """Returns the first names in `folder`, for a message."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    rest = f" and {len(names) - MAX_LISTED_NAMES} more" if len(names) > MAX_LISTED_NAMES else ""
    return (", ".join(names[:MAX_LISTED_NAMES]) or "nothing") + rest


def _check_links(folder: Path) -> None:
    """Raises if a file that may be read is a link out of `folder`."""
    for path in (*folder.iterdir(), folder / layout.VOCABULARY):
        if path.suffix in READ_SUFFIXES:
            within(folder, path)


def _make_backbone(
    cls: type,
    folder: Path,
    reader: ModuleType,
    load_weights: bool,
    dtype: Any,
    kwargs: dict[str, Any],
) -> Any:
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder} has no model: there is no file {CONFIG}. It holds {_list_names(folder)}. "
            "Save a whole model there with `lm.save_to_preset(...)`, or load the part it holds, "
            "such as `GemmaTokenizer.from_preset(...)`."
        )
    stored_arguments = reader.read_backbone(folder)
    arguments = {**stored_arguments, **kwargs}
    if dtype is not None:
        arguments["dtype"] = dtype
    quantization = to_config(stored_arguments.get("quantization"))
    if quantization is not None:
        _check_same(quantization, to_config(kwargs.get("quantization")), folder)
        arguments["quantization"] = quantization
    config = GemmaConfig.from_dict(arguments)
    if not load_weights:
        return cls(**arguments)
    specs = reader.tensor_specs(config, folder, quantization)
    with reader.open_weights(folder) as stored:
        tensor_streaming.check(stored, specs, folder, ignored=reader.IGNORED_TENSORS)
        with uninitialized():
            backbone = cls(**arguments)
        weights = backbone.named_weights()
        tensor_streaming.stream(stored, specs, weights)
    if quantization is not None:
        errors = reader.read_errors(folder)
        for name, weight in weights.items():
            if weight.kind != "norm":
                weight.layer.relative_error = errors.get(name)
    return backbone


def _check_same(
    stored: QuantizationConfig, requested: QuantizationConfig | None, folder: Path
) -> None:
    """Raises if a quantized preset would be quantized again in another way."""
    if requested is not None and requested != stored:
        raise ValueError(
            f"{folder} is quantized already ({stored.describe()}), and quantizing again loses "
            "precision: omit `quantization`, or load the original preset. "
            f"Received: quantization={requested.describe()!r}"
        )


def _make_tokenizer(
    cls: type,
    folder: Path,
    reader: ModuleType,
    load_weights: bool,
    dtype: Any,
    kwargs: dict[str, Any],
) -> Any:
    arguments = {**reader.read_tokenizer(folder), **kwargs}
    if dtype is not None:
        arguments["dtype"] = dtype
    return cls(**arguments)


def _make_preprocessor(
    cls: type,
    folder: Path,
    reader: ModuleType,
    load_weights: bool,
    dtype: Any,
    kwargs: dict[str, Any],
) -> Any:
    arguments = {**(reader.read_preprocessor(folder) or {}), **pop_arguments(cls, kwargs)}
    if dtype is not None:
        arguments["dtype"] = dtype
    if "tokenizer" not in arguments:
        tokenizer = cls.tokenizer_cls
        arguments["tokenizer"] = _make_tokenizer(tokenizer, folder, reader, True, None, kwargs)
    return cls(**arguments)


def _make_task(
    cls: type,
    folder: Path,
    reader: ModuleType,
    load_weights: bool,
    dtype: Any,
    kwargs: dict[str, Any],
) -> Any:
    arguments = pop_arguments(cls, kwargs)
    for_backbone = pop_arguments(cls.backbone_cls, kwargs)
    if "preprocessor" not in arguments:
        has_preprocessor = reader.read_preprocessor(folder) is not None or kwargs
        arguments["preprocessor"] = (
            _make_preprocessor(cls.preprocessor_cls, folder, reader, True, None, kwargs)
            if has_preprocessor
            else None
        )
    if "backbone" not in arguments:
        arguments["backbone"] = _make_backbone(
            cls.backbone_cls, folder, reader, load_weights, dtype, for_backbone
        )
    return cls(**arguments)
