"""Which framework Keras will run on, chosen before Keras is imported.

Knows the environment, the Keras configuration file and which packages are installed; imports
neither Keras nor a framework. Keras alone would fall back to TensorFlow, installed or not.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

BACKENDS = ("jax", "torch", "tensorflow")
"""The frameworks that this package runs on, in the order of preference."""


def is_command() -> bool:
    """Whether this process is the command `keras-gemma`, which chooses the backend by itself."""
    if sys.argv[:1] != ["-m"]:  # which stands there while Python looks for the module to run
        return Path(sys.argv[0]).stem == "keras-gemma"
    named = [after for before, after in pairwise(sys.orig_argv) if before == "-m"]
    return named[:1] == ["keras_gemma"]


def is_installed(backend: str) -> bool:
    """Whether `backend` can be imported; looks, and imports nothing."""
    return importlib.util.find_spec(backend) is not None


def configured_backend(environ: Mapping[str, str]) -> str | None:
    """The backend that the Keras configuration file names; None where it is silent.

    Args:
        environ: the environment, for `KERAS_HOME`, the folder of `keras.json`.
    """
    home = os.path.expanduser("~")
    folder = environ.get("KERAS_HOME", f"{home if os.access(home, os.W_OK) else '/tmp'}/.keras")
    path = Path(os.path.expanduser(folder), "keras.json")
    if not path.is_file():
        return None
    try:
        configuration = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # Keras, too, takes a damaged file for an empty one.
        return None
    return configuration.get("backend")


def choose_backend(
    environ: Mapping[str, str], configured: str | None, installed: Callable[[str], bool]
) -> str:
    """The backend to run on: `KERAS_BACKEND`, else the configured one, else the first installed.

    A configured backend that is not installed does not count: Keras writes "tensorflow" into its
    configuration by itself, on any machine.

    Args:
        environ: the environment, for `KERAS_BACKEND`.
        configured: what the Keras configuration file names, or None.
        installed: says whether a backend can be imported.

    Raises:
        ValueError: `KERAS_BACKEND` names a backend that this package does not run on.
        ImportError: the backend named there, or every backend, is not installed.
    """
    named = environ.get("KERAS_BACKEND")
    if named:
        if named not in BACKENDS:
            raise ValueError(
                f"KERAS_BACKEND must be one of {', '.join(BACKENDS)}. "
                f"Received: KERAS_BACKEND={named!r}"
            )
        if not installed(named):
            raise ImportError(
                f"KERAS_BACKEND={named!r}, but {named} is not installed. "
                f'Install it: pip install "keras-gemma[{named}]"'
            )
        return named
    for backend in (configured, *BACKENDS):
        if backend in BACKENDS and installed(backend):
            return backend
    raise ImportError(
        f"Keras needs a backend, and none of {', '.join(BACKENDS)} is installed. "
        'Install one: pip install "keras-gemma[jax]"'
    )


def use_backend(name: str | None = None) -> str:
    """Set `KERAS_BACKEND` for the Keras that is imported next; returns the backend's name.

    Where Keras is imported already, its backend stays.

    Args:
        name: the backend wanted; None to choose by `choose_backend`.

    Raises:
        ValueError: no such backend, or Keras is running on another one already.
        ImportError: the backend is not installed.
    """
    if "keras" in sys.modules:
        running = sys.modules["keras"].config.backend()
        if name not in (None, running):
            raise ValueError(
                f"Keras is running on {running} already, so it cannot change to {name}. "
                f"Set KERAS_BACKEND={name} before Python starts. Received: backend={name!r}"
            )
        return running
    environ = {**os.environ, "KERAS_BACKEND": name} if name else os.environ
    backend = choose_backend(environ, configured_backend(os.environ), is_installed)
    os.environ["KERAS_BACKEND"] = backend
    return backend
