"""Packages that extras of this package install, and how an error says that one is missing.

Imports neither Keras nor the packages.
"""

import importlib.util

EXPORTS = {
    "tf_saved_model": ("tensorflow", ("tensorflow", "tensorflow_text")),
    "torch": ("torch", ("torch",)),
    "jax": ("jax", ("jax", "flatbuffers")),
    "onnx": ("onnx", ("torch", "onnx", "onnxscript")),
}
"""Extra of each export format, and the packages that the export imports."""

SERVE = ("fastapi", "uvicorn", "pydantic", "prometheus_client", "llguidance")
"""Packages that the HTTP server imports."""


def is_installed(package: str) -> bool:
    """Returns True if `package` is installed, without importing it."""
    return importlib.util.find_spec(package) is not None


def install_hint(extra: str) -> str:
    """Returns a sentence on how to install an extra of this package, such as `"gguf"`.

    The package is not on PyPI yet, so it is installed from a clone.
    """
    return f'Install with `pip install ".[{extra}]"` in a clone of keras_gemma.'


def check_export(format: str) -> None:
    """Checks that the packages of an export format are installed."""
    extra, packages = EXPORTS[format]
    missing = [name for name in packages if not is_installed(name)]
    if missing:
        raise ImportError(
            f"format={format!r} needs {' and '.join(missing)}, not installed here. "
            f"{install_hint(extra)}"
        )


def check_evaluation() -> None:
    """Checks that lm-evaluation-harness is installed."""
    if not is_installed("lm_eval"):
        raise ImportError(f"Benchmarks need lm-eval. {install_hint('evaluation')}")


def check_serve() -> None:
    """Checks that the packages of the HTTP server are installed."""
    missing = [name for name in SERVE if not is_installed(name)]
    if missing:
        raise ImportError(
            f"The server needs {' and '.join(missing)}, not installed here. {install_hint('serve')}"
        )


def check_structured_output() -> None:
    """Checks that llguidance is installed."""
    if not is_installed("llguidance"):
        raise ImportError(f"`response_format` needs llguidance. {install_hint('serve')}")
