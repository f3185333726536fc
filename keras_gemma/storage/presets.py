"""From a preset's folder to an object, and from an object into a folder.

Decides which format a folder has and what each class is made of. Knows no file format
(`keras_preset.py`, `hugging_face.py`, `keras_writer.py`) and no task: classes are handed in.
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
"""What files of a preset are ever read."""
MAX_LISTED_NAMES = 8
"""How many names of a folder's files a message gives."""


def load(
    cls: type,
    preset: str | Path,
    load_weights: bool = True,
    dtype: Any = None,
    **kwargs: Any,
) -> Any:
    """An object of `cls` as a preset describes it.

    Args:
        cls: a backbone, tokenizer, preprocessor or task class, or a subclass of one.
        preset: a built-in name, a `kaggle://` or `hf://` handle, or a directory.
        load_weights: False leaves the weights as initialised, and needs no weights file.
        dtype: the model's dtype or dtype policy. None keeps what a Keras preset or a built-in
            name says, and takes Keras's own policy for a Hugging Face checkpoint.
        **kwargs: arguments of `cls`, or of the parts it is made of, that replace the preset's.

    Raises:
        ValueError: no such preset, arguments that no part has, or files that do not fit.
        FileNotFoundError: a directory or a file in it is missing.
        TypeError: `cls` has no place in a preset.
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
        dtype = presets()[preset].dtype  # the same from either hub
    if model and (published := find(preset)) is not None:  # KerasHub's files do not say it
        kwargs.setdefault("context_length", published.config.context_length)
    _check_links(folder)
    return makers[kind](cls, folder, reader_of(folder), load_weights, dtype, kwargs)


def save(item: Any, preset_dir: str | Path, max_shard_size: int | str = "10GB") -> None:
    """Write `item` to `preset_dir` as a preset that KerasHub reads too.

    Files of an earlier preset there are replaced together, when all new ones are whole; what
    `item` does not contain, such as the tokenizer beside a backbone, stays. A task takes the place
    of a Hugging Face checkpoint; a part of one does not, and is refused.

    Should the machine stop in the moment when the folders change places, `preset_dir` is missing
    and its files lie whole beside it, in a hidden folder: `.my_gemma.k3x9/old`, to be renamed.

    Args:
        item: a backbone, tokenizer, preprocessor or task.
        preset_dir: the folder; made if it does not exist.
        max_shard_size: the size of a weights file, in bytes or as `"10GB"`.

    Raises:
        ValueError: `preset_dir` is a file, the current directory, an address or a place where
            nothing can be written; it holds a Hugging Face checkpoint and `item` is no task; a
            weight is larger than `max_shard_size`; or an adapter is on in a quantized model.
        TypeError: `item` has no place in a preset, or `preset_dir` is neither a string nor a path.
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
    """The module that reads the format of `folder`."""
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
            f"{folder} is no preset: looked for {CONFIG}, {layout.VOCABULARY}, "
            f"{hugging_face.VOCABULARY} and Hugging Face's tokenizer.json, and found none of them. "
            f"It holds {_list_names(folder)}. Pass a folder that `lm.save_to_preset(...)` wrote, or a "
            "Hugging Face checkpoint."
        )
    content = read_json(path)
    if "registered_name" in content or "class_name" in content:
        return keras_preset
    if "model_type" in content:
        return hugging_face
    raise ValueError(
        f"{path} is of neither format: looked for `registered_name` or `class_name` (Keras) and "
        f"`model_type` (Hugging Face). It has the keys {', '.join(sorted(content)) or 'none'}."
    )


def _list_names(folder: Path) -> str:
    """The names in `folder`, the first ones of many, for a message."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    rest = f" and {len(names) - MAX_LISTED_NAMES} more" if len(names) > MAX_LISTED_NAMES else ""
    return (", ".join(names[:MAX_LISTED_NAMES]) or "nothing") + rest


def _check_links(folder: Path) -> None:
    """Raise where a file that may be read is a link out of `folder`."""
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
            f"{folder} describes no model: there is no file {CONFIG}. It holds {_list_names(folder)}. "
            "Save a whole model there, `lm.save_to_preset(...)`, or load the part that it holds, "
            "such as `GemmaTokenizer.from_preset(...)`."
        )
    described = reader.read_backbone(folder)
    arguments = {**described, **kwargs}
    if dtype is not None:
        arguments["dtype"] = dtype
    stored_as = to_config(described.get("quantization"))
    if stored_as is not None:
        _check_same(stored_as, to_config(kwargs.get("quantization")), folder)
        arguments["quantization"] = stored_as
    config = GemmaConfig.from_dict(arguments)
    if not load_weights:
        return cls(**arguments)
    specs = reader.tensor_specs(config, folder, stored_as)
    with reader.open_weights(folder) as stored:
        tensor_streaming.check(stored, specs, folder, ignored=reader.IGNORED_TENSORS)
        with uninitialized():
            backbone = cls(**arguments)
        weights = backbone.named_weights()
        tensor_streaming.stream(stored, specs, weights)
    if stored_as is not None:
        errors = reader.read_errors(folder)
        for name, weight in weights.items():
            if weight.kind != "norm":
                weight.holder.relative_error = errors.get(name)
    return backbone


def _check_same(stored: QuantizationConfig, asked: QuantizationConfig | None, folder: Path) -> None:
    """Raise where a quantized preset is to be quantized in another way."""
    if asked is not None and asked != stored:
        raise ValueError(
            f"{folder} is quantized already ({stored.describe()}), and each time costs precision: "
            "leave `quantization` out, or load the preset that it was made from. "
            f"Received: quantization={asked.describe()!r}"
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
        described = reader.read_preprocessor(folder) is not None or kwargs
        arguments["preprocessor"] = (
            _make_preprocessor(cls.preprocessor_cls, folder, reader, True, None, kwargs)
            if described
            else None
        )
    if "backbone" not in arguments:
        arguments["backbone"] = _make_backbone(
            cls.backbone_cls, folder, reader, load_weights, dtype, for_backbone
        )
    return cls(**arguments)
