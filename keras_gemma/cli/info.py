"""`keras-gemma info`: installed versions and the backend, or the sizes of a model."""

import importlib.metadata
import json
import os
import platform
from typing import Any

from typer import Argument

from keras_gemma import catalogue
from keras_gemma.backend_choice import choose_backend, configured_backend, is_installed
from keras_gemma.cli.options import JsonOption, full_name, start
from keras_gemma.cli.presets import describe
from keras_gemma.version import __version__

PACKAGES = ("keras", "jax", "torch", "tensorflow", "keras-hub")


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def info(
    model: str | None = Argument(
        None, help="Preset name, handle, folder or GGUF file to describe.", show_default=False
    ),
    as_json: JsonOption = False,
) -> None:
    """Show installed versions and the backend, or the sizes of MODEL."""
    facts = model_facts(full_name(model)) if model else installed_versions()
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    missing = "none" if model else "not installed"
    width = max(map(len, facts)) + 1
    for name, value in facts.items():
        shown = f"{value:,}" if isinstance(value, int) and value is not True else value
        print(f"{name:<{width}} {missing if value is None else shown}")


def installed_versions() -> dict[str, str | None]:
    """Returns the backend, and the versions of this package, Python and the frameworks."""
    return {
        "keras-gemma": __version__,
        "backend": choose_backend(os.environ, configured_backend(os.environ), is_installed),
        "python": platform.python_version(),
        **{package: installed_version(package) for package in PACKAGES},
    }


def model_facts(model: str) -> dict[str, Any]:
    """Returns the sizes of a model, without importing Keras if it has a preset name."""
    listed = catalogue.find(model)
    if listed is not None:
        facts, config = describe(listed), listed.config
    else:
        start(None)
        from keras_gemma.cli.loading import read_description
        from keras_gemma.config import GemmaConfig

        config = GemmaConfig.from_dict(read_description(model))
        facts = {"name": model, "parameters": config.parameter_count}
    memory = facts.pop("memory", None) or {"bfloat16": config.weight_bytes("bfloat16")}
    facts |= {f"bytes in {dtype}": size for dtype, size in memory.items()}
    return {**facts, **config.to_dict()}
