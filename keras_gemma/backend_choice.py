"""Choice of the Keras backend, made before Keras is imported.

Knows the environment, the Keras configuration file and which packages are installed; imports
neither Keras nor a framework. By itself, Keras falls back to TensorFlow, installed or not.
"""

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Mapping, MutableMapping
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

from keras_gemma.extras import install_hint, is_installed

Backend = Literal["jax", "torch", "tensorflow"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
"""Supported backends, in order of preference."""

KERAS_DEFAULTS = {
    "floatx": "float32",
    "epsilon": 1e-07,
    "backend": "tensorflow",
    "image_data_format": "channels_last",
}
"""Content of the configuration file that Keras writes when it is first imported."""


XNNPACK_VERSIONS = ((0, 7), (0, 8))
"""JAX versions whose products of float32 outside of a compiled program are wrong in some calls on
a CPU: a block's output differed by 7 from call to call. It did not without the library XNNPACK."""


def is_command() -> bool:
    """Returns True if this process is the command `keras-gemma`, which sets the backend itself."""
    if sys.argv[:1] != ["-m"]:  # "-m" is the placeholder while Python locates the module.
        return Path(sys.argv[0]).stem == "keras-gemma"
    named = [after for before, after in pairwise(sys.orig_argv) if before == "-m"]
    return named[:1] == ["keras_gemma"]


def configured_backend(environ: Mapping[str, str]) -> str | None:
    """Returns the backend in the Keras configuration file, or `None` if it is not set.

    A file that Keras wrote by itself sets no backend: it names TensorFlow on every machine.
    """
    home = os.path.expanduser("~")
    folder = environ.get("KERAS_HOME", f"{home if os.access(home, os.W_OK) else '/tmp'}/.keras")
    path = Path(os.path.expanduser(folder), "keras.json")
    if not path.is_file():
        return None
    try:
        configuration = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # Keras also treats a damaged file as empty.
        return None
    return None if configuration == KERAS_DEFAULTS else configuration.get("backend")


def choose_backend(
    environ: Mapping[str, str], configured: str | None, installed: Callable[[str], bool]
) -> str:
    """Returns `KERAS_BACKEND`, else the configured backend, else the first installed one.

    A configured backend that is not installed is ignored.
    """
    named = environ.get("KERAS_BACKEND")
    if named:
        if named not in BACKENDS:
            raise ValueError(
                f"KERAS_BACKEND must be one of {', '.join(BACKENDS)}. "
                f"Received: KERAS_BACKEND={named!r}"
            )
        check_installed(named, "KERAS_BACKEND", installed)
        return named
    for backend in (configured, *BACKENDS):
        if backend in BACKENDS and installed(backend):
            return backend
    raise ImportError(
        f"Keras needs a backend, and none of {', '.join(BACKENDS)} is installed. "
        f"{install_hint('jax')}"
    )


def check_installed(backend: str, setting: str, installed: Callable[[str], bool]) -> None:
    """Checks that `backend` is installed. `setting` is the variable or argument that names it."""
    if not installed(backend):
        raise ImportError(
            f"{setting}={backend!r}, but {backend} is not installed. {install_hint(backend)}"
        )


def use_backend(name: str | None = None) -> str:
    """Sets `KERAS_BACKEND` to `name`, or to a chosen backend, and returns the backend.

    If Keras is already imported, its backend is unchanged, and another `name` is an error.
    """
    if "keras" in sys.modules:
        running = sys.modules["keras"].config.backend()
        if name not in (None, running):
            raise ValueError(
                f"Keras is already running on {running}, so it cannot change to {name}. "
                f"Set KERAS_BACKEND={name} before Python starts. Received: backend={name!r}"
            )
        return running
    if name is None:
        name = choose_backend(os.environ, configured_backend(os.environ), is_installed)
    else:
        check_installed(name, "backend", is_installed)
    os.environ["KERAS_BACKEND"] = name
    if name == "jax":
        avoid_xnnpack(os.environ, importlib.metadata.version("jax"))
    return name


def avoid_xnnpack(environ: MutableMapping[str, str], version: str) -> None:
    """Sets a flag of XLA, which reads it at the first computation, if this JAX version needs it."""
    flags = environ.get("XLA_FLAGS", "")
    minor = tuple(int(part) for part in version.split(".")[:2])
    if minor in XNNPACK_VERSIONS and "xla_cpu_use_xnnpack" not in flags:
        environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_xnnpack=false".strip()
