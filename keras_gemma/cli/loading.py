"""Loads a model for a command, in a precision that fits into the free memory.

Imports Keras, so commands import this module after they have chosen the backend.
"""

import contextlib
import dataclasses
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from keras_gemma import backend, catalogue, progress
from keras_gemma.causal_lm.model import GemmaCausalLM
from keras_gemma.cli.options import (
    Dtype,
    Fit,
    LoadedQuantization,
    ModelOptions,
    drop_none,
    full_name,
)
from keras_gemma.config import GemmaConfig
from keras_gemma.generation.memory import Workload, bytes_needed
from keras_gemma.quantization import QuantizationConfig, to_config
from keras_gemma.storage.adapters.peft import CONFIG, base_model, find_adapter
from keras_gemma.storage.files import read_json
from keras_gemma.storage.format_interface import Reader
from keras_gemma.storage.formats import format_of
from keras_gemma.storage.hub.locate import resolve

QUANTIZATION: dict[Fit, QuantizationConfig | None] = {
    "exact": None,
    "speed": QuantizationConfig("int8"),
    "memory": QuantizationConfig("int4"),
    "memory_extreme": QuantizationConfig("int4", embedding="int4"),
}
"""Quantization of each fit, in the order that `auto` tries them."""

LOADING_OVERHEAD = 1.15
"""Peak memory while weights are loaded, as a multiple of their size."""

PROGRAM_BYTES = 300_000_000
"""Memory of compiled programs and other small objects, in bytes."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Precision in which a model is loaded."""

    arguments: dict[str, Any]
    """Arguments of `from_preset`."""
    reason: str
    """Reason for the choice, to be printed."""
    is_expected: bool
    """True if the user asked for this precision, or the model is stored in it."""


def find_name(options: ModelOptions, default: str) -> str:
    """Returns the model of a command: --model, else the base of --lora, else `default`."""
    if options.model is not None:
        return full_name(options.model)
    return (options.lora and base_model(options.lora)) or default


def load_model(
    options: ModelOptions, name: str, silent: bool = False, explain: bool = False
) -> GemmaCausalLM:
    """Returns the model of a command, and prints to standard error in which precision.

    `explain` prints even the expected precision.
    """
    choice = choose(name, options.fit, options.dtype, options.quantization)
    if not silent and (explain or not choice.is_expected):
        progress.end_status()
        print(f"{name}: {choice.reason}", file=sys.stderr)
    return load(choice, name, silent, options.lora)


def load(
    choice: Choice, model: str, silent: bool = False, lora: Path | None = None
) -> GemmaCausalLM:
    """Returns the model, with the adapter in folder `lora`. `silent` hides the progress bar."""
    if lora is not None:
        find_adapter(lora)  # Fails before the weights are read.
    with progress.hidden() if silent else progress.status(f"Loading {model} ..."):
        lm = GemmaCausalLM.from_preset(model, **choice.arguments)
    if lora is not None:
        lm.load_lora(lora)
    return lm


def choose(
    model: str, fit: Fit, dtype: Dtype | None, quantization: LoadedQuantization | None = None
) -> Choice:
    """Chooses the precision of `model`. If `fit` is `auto` and none fits, raises a ValueError."""
    arguments: dict[str, Any] = {"dtype": dtype}
    if quantization is not None or fit != "auto":
        arguments |= drop_none(quantization=quantization or QUANTIZATION[fit])
        return Choice(arguments, f"{quantization or fit}, as requested", True)
    description = read_description(model)
    if description.get("quantization") is not None:
        return Choice(arguments, "quantized, as stored", True)
    config = read_config(model)
    free = backend.free_memory()
    if free is None:
        return Choice(arguments, "exact (free memory could not be determined)", True)
    larger = []
    for fit, config_of_fit in QUANTIZATION.items():
        needed = bytes_of_fit(config, fit, dtype or stored_dtype(model))
        if needed <= free:
            reason = f"{fit}, needs up to {_size(needed)} of {_size(free)} free"
            arguments |= drop_none(quantization=config_of_fit)
            return Choice(arguments, "; ".join([reason, *larger]), fit == "exact")
        larger.append(f"{fit} needs {_size(needed)}")
    raise ValueError(
        f"{model} does not fit into memory: even {fit} needs up to {_size(needed)}, and "
        f"{_size(free)} are free. Choose a smaller --model, or pass --fit to try it anyway."
    )


def read_description(model: str) -> dict[str, Any]:
    """Returns the stored arguments of a model's backbone, without reading its weights."""
    folder = resolve(model, text=False, weights=False)
    return format_of(folder).read_backbone(folder)


def read_config(model: str) -> GemmaConfig:
    """Returns a model's config, without reading its weights."""
    listed = catalogue.find(model)
    return listed.config if listed else GemmaConfig.from_dict(read_description(model))


def describe_folder(model: str) -> dict[str, Any]:
    """Returns what the folder or file of a model is: format, precision and sizes."""
    path = resolve(model, text=False, weights=False)
    format = format_of(path)
    description = format.read_backbone(path)
    config = GemmaConfig.from_dict(description)
    quantization = to_config(description.get("quantization"))
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {
        "name": model,
        "format": format.title,
        "parameters": config.parameter_count,
        "stored as": stored_types(format, path, config),
        "quantization": quantization and quantization.describe(),
        "bytes on disk": sum(file.stat().st_size for file in files),
        **config.to_dict(),
    }


def stored_types(format: Reader, path: Path, config: GemmaConfig) -> str | None:
    """Returns the number formats of the weights in a folder or file, that of most numbers first.

    Returns `None` if there are no weights.
    """
    if format.read_stored_types is not None:
        types = format.read_stored_types(path, config)
        return ", ".join(sorted(set(types.values()))) or "floating point"
    counts: Counter[str] = Counter()
    with contextlib.suppress(FileNotFoundError), format.open_weights(path) as stored:
        for tensor in stored.values():
            counts[tensor.dtype] += math.prod(tensor.shape)
    return ", ".join(dtype for dtype, _ in counts.most_common()) or None


def describe_adapter(folder: Path) -> dict[str, Any]:
    """Returns the base model and the settings of an adapter."""
    find_adapter(folder)
    values = read_json(folder / CONFIG)
    modules = values.get("target_modules") or []
    return {
        "name": str(folder),
        "format": "LoRA adapter (PEFT)",
        "base model": base_model(folder),
        "rank": values.get("r"),
        "alpha": values.get("lora_alpha"),
        "targets": modules if isinstance(modules, str) else ", ".join(modules),
        "bytes on disk": sum(file.stat().st_size for file in folder.iterdir()),
    }


def stored_dtype(model: str) -> str:
    """Returns the dtype in which a model's weights are stored."""
    listed = catalogue.find(model)
    if listed and listed.dtype:
        return listed.dtype
    return str(read_description(model).get("dtype") or "float32")


def bytes_of_fit(config: GemmaConfig, fit: Fit, dtype: str) -> int:
    """Returns the peak memory of loading a model and generating one text of its whole context."""
    length = config.context_length
    text = Workload(1, 1, length - 1, length)
    quantization = QUANTIZATION[fit]
    if quantization is None:
        weights = config.weight_bytes(dtype)
    else:
        weights = config.weight_bytes(quantization.mode, quantization.embedding)
    peak = max(LOADING_OVERHEAD * weights, weights + bytes_needed(text, config, dtype))
    return int(peak + PROGRAM_BYTES)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
