"""`keras-gemma info`: what is installed, and what would run."""

import importlib.metadata
import json
import os
import platform
from typing import Annotated

import typer

from keras_gemma.backend_choice import choose_backend, configured_backend, is_installed
from keras_gemma.version import __version__

PACKAGES = ("keras", "jax", "torch", "tensorflow", "keras-hub")


def installed_version(package: str) -> str | None:
    """The version of `package`, read without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def info(
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Show the version, the backend and the frameworks."""
    facts = {
        "keras-gemma": __version__,
        "backend": choose_backend(os.environ, configured_backend(os.environ), is_installed),
        "python": platform.python_version(),
        **{package: installed_version(package) for package in PACKAGES},
    }
    if as_json:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        print(f"{name:<12} {value or 'not installed'}")
