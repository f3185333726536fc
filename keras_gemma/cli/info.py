"""`keras-gemma info`: versions and device of this machine, or a model, folder or adapter."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

from typer import Argument

from keras_gemma import catalogue, hub_caches, progress
from keras_gemma.backend_choice import choose_backend, configured_backend, is_installed
from keras_gemma.checks import is_integer
from keras_gemma.cli.options import BackendOption, JsonOption, full_name, start
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
        None,
        help="Preset name, handle, folder, GGUF file or adapter to describe.",
        show_default=False,
    ),
    backend: BackendOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show versions, device and caches, or what MODEL is: its format, precision and sizes."""
    facts = model_facts(full_name(model), backend) if model else machine_facts(backend)
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    missing = "none" if model else "not installed"
    width = max(map(len, facts)) + 1
    for name, value in facts.items():
        shown = f"{value:,}" if is_integer(value) else value
        print(f"{name:<{width}} {missing if value is None else shown}")


def machine_facts(backend_name: str | None) -> dict[str, Any]:
    """Returns versions, and the backend's device, its free memory, and the folders of caches."""
    facts: dict[str, Any] = {
        "keras-gemma": __version__,
        "backend": backend_name
        or choose_backend(os.environ, configured_backend(os.environ), is_installed),
        "python": platform.python_version(),
        **{package: installed_version(package) for package in PACKAGES},
    }
    start(backend_name)
    with progress.status("Starting ..."):
        from keras_gemma import backend

        has_accelerator = backend.peak_device_memory() is not None
        free = backend.free_memory()
    facts["device"] = "accelerator" if has_accelerator else "cpu"
    facts["free memory"] = "unknown" if free is None else f"{free / 1e9:.1f} GB"
    caches = hub_caches.hugging_face_cache(), hub_caches.kaggle_cache(), hub_caches.own_cache()
    names = ("Hugging Face cache", "Kaggle cache", "own cache")
    return facts | {name: str(folder) for name, folder in zip(names, caches, strict=True)}


def model_facts(model: str, backend_name: Any = None) -> dict[str, Any]:
    """Returns what a model is, without importing Keras if it has a preset name."""
    listed = catalogue.find(model)
    if listed is not None:
        facts = describe(listed)
        memory = facts.pop("memory")
        facts |= {f"bytes in {dtype}": size for dtype, size in memory.items()}
        return {**facts, "dtype": listed.dtype, **listed.config.to_dict()}
    start(backend_name)
    with progress.status("Starting ..."):
        from keras_gemma.cli.loading import describe_adapter, describe_folder

    if (Path(model) / "adapter_config.json").is_file():
        return describe_adapter(Path(model))
    return describe_folder(model)
