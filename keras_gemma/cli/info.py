"""`keras-gemma info`: what is installed, and what would run; or what a model is."""

import importlib.metadata
import json
import os
import platform
from typing import Annotated, Any

import typer

from keras_gemma import catalogue
from keras_gemma.backend_choice import choose_backend, configured_backend, is_installed
from keras_gemma.cli.options import full_name, start
from keras_gemma.cli.presets import describe
from keras_gemma.version import __version__

PACKAGES = ("keras", "jax", "torch", "tensorflow", "keras-hub")


def installed_version(package: str) -> str | None:
    """The version of `package`, read without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def info(
    model: Annotated[
        str | None,
        typer.Argument(help="A name, handle or directory, to be described.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Show the version, the backend and the frameworks; or the sizes of MODEL."""
    facts = facts_of(full_name(model)) if model else installed()
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    missing = "none" if model else "not installed"
    width = max(map(len, facts)) + 1
    for name, value in facts.items():
        shown = f"{value:,}" if isinstance(value, int) and value is not True else value
        print(f"{name:<{width}} {missing if value is None else shown}")


def installed() -> dict[str, str | None]:
    """The versions of this package and of what it runs on."""
    return {
        "keras-gemma": __version__,
        "backend": choose_backend(os.environ, configured_backend(os.environ), is_installed),
        "python": platform.python_version(),
        **{package: installed_version(package) for package in PACKAGES},
    }


def facts_of(model: str) -> dict[str, Any]:
    """The sizes of a model; those of a name are known without Keras.

    Raises:
        ValueError, FileNotFoundError: there is no such model.
    """
    listed = catalogue.find(model)
    if listed is not None:
        facts, config = describe(listed), listed.config
    else:
        start(None)
        from keras_gemma.config import GemmaConfig
        from keras_gemma.storage.formats import format_of
        from keras_gemma.storage.hub.locate import resolve

        folder = resolve(model, text=False, weights=False)
        config = GemmaConfig.from_dict(format_of(folder).read_backbone(folder))
        facts = {"name": model, "parameters": config.parameter_count}
    memory = facts.pop("memory", None) or {"bfloat16": config.weight_bytes("bfloat16")}
    facts |= {f"bytes in {dtype}": size for dtype, size in memory.items()}
    return {**facts, **config.to_dict()}
