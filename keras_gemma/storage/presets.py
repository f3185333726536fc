"""Loads objects from a preset's folder and saves objects into one.

Decides what each class is built from. Knows neither file formats (`formats.py`) nor tasks: classes
are passed in.
"""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

from keras_gemma.backend import uninitialized
from keras_gemma.catalogue import find
from keras_gemma.config import GemmaConfig
from keras_gemma.model.weights import QuantizedWeight, randomize
from keras_gemma.quantization import AS_STORED, QuantizationConfig, to_config
from keras_gemma.storage import formats
from keras_gemma.storage.arguments import check_arguments, kind_of, pop_arguments
from keras_gemma.storage.files import check_target, local_path, replacing, within
from keras_gemma.storage.format_interface import Reader
from keras_gemma.storage.hub.downloads import DownloadError
from keras_gemma.storage.hub.locate import resolve
from keras_gemma.storage.keras_preset import layout, writer
from keras_gemma.storage.sharding import parse_gigabytes
from keras_gemma.storage.tensor_streaming import stream

READ_SUFFIXES = {
    suffix
    for format in formats.FORMATS.values()
    for pattern in format.files
    if (suffix := Path(pattern).suffix)
} | {".msgpack"}
"""Suffixes of the files of a preset that may be read."""


def load(
    cls: type, preset: str | Path, load_weights: bool = True, dtype: Any = None, **kwargs: Any
) -> Any:
    """Implements `Presettable.from_preset`.

    A dtype of `None` uses the policy of a Keras preset or a built-in name, and Keras's global
    policy for a Hugging Face checkpoint.
    """
    kind = kind_of(cls)
    check_arguments(cls, load_weights, dtype, kwargs)
    text = kind != "backbone" and "preprocessor" not in kwargs
    model = kind in ("backbone", "task") and "backbone" not in kwargs
    try:
        folder = resolve(preset, text=text, weights=model and load_weights)
    except DownloadError as error:
        if not (model and text) or load_weights:
            raise
        raise ValueError(
            f"{error} Only the tokenizer needs a download: pass `preprocessor=None` for a model "
            "without one."
        ) from error
    if model and (published := find(preset)) is not None:
        if dtype is None and preset == published.name:
            dtype = published.dtype  # the same for both hubs
        # Not in KerasHub's files: the context, and in early ones of Gemma 3 the scaling.
        kwargs.setdefault("context_length", published.config.context_length)
        factor = published.config.global_rope_scaling_factor
        if factor != 1.0:
            kwargs.setdefault("global_rope_scaling_factor", factor)
    _check_links(folder)
    parts = PresetParts(folder, formats.format_of(folder), load_weights)
    if text and (message := parts.format.find_ignored_part(folder)) is not None:
        warnings.warn(message, stacklevel=3)  # the caller of `from_preset`
    item = getattr(parts, kind)(cls, kwargs, dtype)
    if model:
        backbone = item if kind == "backbone" else item.backbone
        backbone.preset = _full_name(preset)
    return item


def _full_name(preset: str | Path) -> str:
    """Returns a preset's name, or the absolute path if it is a folder or a file."""
    path = Path(preset).expanduser()
    return str(path.resolve()) if find(preset) is None and path.exists() else str(preset)


def save(
    item: Any,
    preset_dir: str | Path,
    max_shard_size: float | str | None = 10,
    overwrite: bool = False,
) -> None:
    """Implements `Presettable.save_to_preset`.

    A part, such as a tokenizer, is saved into a preset that lacks it without `overwrite`. Files of
    an earlier preset are replaced together when all new files are complete. Files that `item` does
    not contain are kept. A task replaces a Hugging Face checkpoint; a part of a task is refused
    there.
    """
    kind = kind_of(type(item))
    max_shard_bytes = parse_gigabytes(max_shard_size)
    if kind == "task":
        formats.save_as(item, "keras", preset_dir, max_shard_bytes, "preset_dir", overwrite)
        return
    preset_dir = local_path(preset_dir, "preset_dir")
    if kind == "backbone":
        writer.check_backbone(item, max_shard_bytes)
    formats.check_only_format(formats.FORMATS["keras"], preset_dir)
    has_part = any(next(preset_dir.glob(file), None) for file in layout.PART_FILES[kind])
    check_target(preset_dir, formats.MODELS, overwrite or not has_part, "preset_dir")

    stale = layout.BACKBONE_FILES if kind == "backbone" else ()
    with replacing(preset_dir, lambda name: formats.matches_any(name, stale)) as folder:
        if kind == "backbone":
            writer.write_backbone(folder, item, max_shard_bytes)
        elif kind == "preprocessor":
            writer.write_preprocessor(folder, item, item.tokenizer_cls.family)
        else:
            writer.write_tokenizer(folder, item, item.family)


def _check_links(folder: Path) -> None:
    """Raises if a file that may be read is a link out of `folder`."""
    files = (*folder.iterdir(), folder / layout.VOCABULARY) if folder.is_dir() else ()
    for path in files:
        if path.suffix in READ_SUFFIXES:
            within(folder, path)


@dataclasses.dataclass(frozen=True)
class PresetParts:
    """Builds the parts of a preset. There is a method for each value of `kind_of`.

    The methods take a class, arguments that override the preset's, and a dtype. A dtype of `None`
    keeps the preset's.
    """

    folder: Path
    format: Reader
    load_weights: bool

    def backbone(self, cls: type, kwargs: dict[str, Any], dtype: Any = None) -> Any:
        folder, format = self.folder, self.format
        needs_config = folder.is_dir() and format.requires_config
        if needs_config and not (folder / formats.CONFIG).is_file():
            raise ValueError(
                f"{folder} has no model: it lacks {formats.CONFIG}. It holds "
                f"{formats.list_names(folder)}. Save a whole model there with "
                "`lm.save_to_preset(...)`, or load the part it holds, such as "
                "`GemmaTokenizer.from_preset(...)`."
            )
        stored_arguments = format.read_backbone(folder)
        arguments = {**cls.arguments_of(stored_arguments), **kwargs}
        arguments = _with_dtype(arguments, dtype)
        _check_complete(arguments, format, folder)
        config = cls.config_of(arguments)
        quantization = to_config(stored_arguments.get("quantization"))
        requested = to_config(kwargs.get("quantization"))
        if quantization is not None:
            _check_same(quantization, requested, folder)
            arguments["quantization"] = quantization
        elif requested is not None and requested.mode == AS_STORED:
            arguments["quantization"] = quantization = _as_stored(format, folder, config)
        if not self.load_weights and quantization is not None and quantization.mode == AS_STORED:
            return cls(**arguments)  # zeros, because no random numbers have the types of the file
        if not self.load_weights:
            with uninitialized():
                backbone = cls(**arguments)
            randomize(backbone.named_weights(), backbone.variable_dtype)
            return backbone
        with formats.open_checked(format, folder, config, quantization) as (stored, specs):
            with uninitialized():
                backbone = cls(**arguments)
            weights = backbone.named_weights()
            stream(stored, specs, weights)
        if quantization is not None:
            errors = format.read_errors(folder)
            for name, weight in weights.items():
                if isinstance(weight, QuantizedWeight):
                    weight.layer.relative_error = errors.get(name)
        return backbone

    def tokenizer(self, cls: type, kwargs: dict[str, Any], dtype: Any = None) -> Any:
        return cls(**_with_dtype({**self.format.read_tokenizer(self.folder), **kwargs}, dtype))

    def preprocessor(self, cls: type, kwargs: dict[str, Any], dtype: Any = None) -> Any:
        arguments = self.format.read_preprocessor(self.folder) or {}
        arguments = _with_dtype({**arguments, **pop_arguments(cls, kwargs)}, dtype)
        if "tokenizer" not in arguments:
            arguments["tokenizer"] = self.tokenizer(cls.tokenizer_cls, kwargs)
        return cls(**arguments)

    def task(self, cls: type, kwargs: dict[str, Any], dtype: Any = None) -> Any:
        arguments = pop_arguments(cls, kwargs)
        for_backbone = pop_arguments(cls.backbone_cls, kwargs)
        if "preprocessor" not in arguments:
            has_preprocessor = self.format.read_preprocessor(self.folder) is not None or kwargs
            arguments["preprocessor"] = (
                self.preprocessor(cls.preprocessor_cls, kwargs) if has_preprocessor else None
            )
        if "backbone" not in arguments:
            arguments["backbone"] = self.backbone(cls.backbone_cls, for_backbone, dtype)
        return cls(**arguments)


def _with_dtype(arguments: dict[str, Any], dtype: Any) -> dict[str, Any]:
    return arguments if dtype is None else {**arguments, "dtype": dtype}


def _check_complete(arguments: dict[str, Any], format: Reader, folder: Path) -> None:
    """Raises if neither the folder nor the caller tells a setting of the model."""
    missing = [name for name in format.required_arguments if name not in arguments]
    if missing:
        raise ValueError(
            f"{folder} does not specify {', '.join(missing)}, and its sizes are not those of a "
            f"published model. Pass them to `from_preset`, such as {missing[0]}=..., or add the "
            f"model's {formats.CONFIG} to the folder."
        )


def _check_same(
    stored: QuantizationConfig, requested: QuantizationConfig | None, folder: Path
) -> None:
    """Raises if a quantized preset would be quantized again in another way."""
    keeps = stored.mode == AS_STORED and requested == QuantizationConfig(AS_STORED)
    if requested is not None and requested != stored and not keeps:
        raise ValueError(
            f"{folder} is quantized already ({stored.describe()}), and quantizing again loses "
            "precision: omit `quantization`, or load the original preset. "
            f"Received: quantization={requested.describe()!r}"
        )


def _as_stored(format: Reader, path: Path, config: GemmaConfig) -> QuantizationConfig | None:
    """Returns the quantization of a file that keeps its numbers; `None` if it has only floats."""
    if format.read_stored_types is None:
        raise ValueError(
            "`quantization='as_stored'` keeps the numbers of a GGUF file, but "
            f"{path} is a {format.title}. Pass a GGUF file, or quantization='int8' or 'int4'."
        )
    types = format.read_stored_types(path, config)
    return QuantizationConfig(AS_STORED, types=types) if types else None
