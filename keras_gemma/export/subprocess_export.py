"""An export made here, or by a process on the backend that its format needs.

There the model goes as a preset, with an order in JSON, in a folder beside the new export that is
removed afterwards. Each line that the process prints says what is being done. Knows no format.
"""

import errno
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from keras_gemma.backend_choice import is_installed
from keras_gemma.progress import bar
from keras_gemma.quantization import QuantizationConfig
from keras_gemma.storage.files import read_json, write_json

STAGES = 9
"""Of the work, about."""

PRESET, ORDER = "preset", "order.json"

PROGRAM = """
import os, sys
lines = os.dup(1)
os.dup2(2, 1)  # what libraries print there is not for the parent
sys.path[:] = {path!r}
import keras_gemma
from keras_gemma.export import subprocess_export as making
making.follow(sys.argv[1], lines, keras_gemma.GemmaCausalLM.from_preset)
"""

LAST_WORDS = 2000
"""Characters of what a process that failed wrote at the end."""


def check(lm: Any, format: str, packages: tuple[str, ...], extras: str) -> None:
    """Raise where `lm` cannot be exported for want of a tokenizer or a package.

    Args:
        lm: a `GemmaCausalLM`.
        format: as of `export`.
        packages: that must be installed to write the format.
        extras: of this package that bring them, such as `"torch,onnx"`.

    Raises:
        ValueError: no preprocessor.
        ImportError: packages are missing.
    """
    if lm.preprocessor is None:
        raise ValueError(
            "An export holds the vocabulary that the model reads: make it with a preprocessor, as "
            "GemmaCausalLM(backbone, preprocessor). Received: lm.preprocessor=None"
        )
    missing = [name for name in packages if not is_installed(name)]
    if missing:
        raise ImportError(
            f"format={format!r} needs {' and '.join(missing)}, not installed here. Install by "
            f'`pip install "keras-gemma[{extras}]"`.'
        )


def make(
    build: Callable[..., None],
    lm: Any,
    directory: Path,
    backend: str,
    quantization: QuantizationConfig | None = None,
    **options: Any,
) -> None:
    """Fill `directory` by `build(lm, directory, say, **options)`, on the Keras backend `backend`.

    Args:
        build: a function of a module; it calls `say` with what is being done.
        lm: a `GemmaCausalLM`.
        directory: the empty folder.
        backend: `"jax"`, `"torch"` or `"tensorflow"`, which must be installed.
        quantization: of the export alone.
        **options: as JSON can hold them.

    Raises:
        OSError: no room on the disk.
        RuntimeError: the other process failed; the text ends with what it said.
    """
    here = keras.config.backend() == backend and quantization is None
    check_room(lm, directory, times=1 if here else 2)
    with bar("Exporting", STAGES) as advance:

        def say(what: str) -> None:
            advance(1, what)

        if here:
            build(lm, directory, say, **options)
            return
        with tempfile.TemporaryDirectory(prefix=".model.", dir=directory.parent) as work:
            say("Writing the weights down")
            lm.save_to_preset(Path(work, PRESET))
            order = {
                "build": [build.__module__, build.__name__],
                "directory": str(directory.resolve()),
                "quantization": None if quantization is None else quantization.to_dict(),
                "options": options,
            }
            write_json(Path(work, ORDER), order)
            say(f"Starting KERAS_BACKEND={backend}")
            make_elsewhere(Path(work), backend, say)


def check_room(lm: Any, directory: Path, times: int) -> None:
    """Raise an OSError where the disk has no room for the weights so many times."""
    needed = times * sum(weight.bytes for weight in lm.backbone.named_weights().values())
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"The export needs {needed / 1e6:,.0f} MB on the disk of `path`, and "
            f"{free / 1e6:,.0f} MB are free. Make room, or name a place on another disk",
            str(directory.parent.parent),
        )


def make_elsewhere(work: Path, backend: str, say: Callable[[str], None]) -> None:
    """Have the order in the folder `work` followed by a process on `backend`."""
    environ = {"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ, "KERAS_BACKEND": backend}
    environ.pop("XLA_FLAGS", None)  # what one framework knows, another may refuse
    errors = work / "errors"
    with (
        errors.open("wb") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(path=sys.path), str(work)],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        try:
            for line in process.stdout:
                say(json.loads(line))
            process.wait()
        finally:
            process.kill()  # where this process was interrupted
    if process.returncode:
        said = errors.read_text(encoding="utf-8", errors="replace").strip()
        raise RuntimeError(
            f"The export is made by a process with KERAS_BACKEND={backend}, which ended with code "
            f"{process.returncode}. It said at the end:\n{said[-LAST_WORDS:]}"
        )


def follow(work: str, lines: int, load: Callable[..., Any]) -> None:
    """Follow the order in the folder `work`.

    Args:
        work: the folder.
        lines: the file descriptor to say on what is being done.
        load: `from_preset` of the model, which stands above this folder.
    """
    output = os.fdopen(lines, "w", encoding="utf-8")

    def say(what: str) -> None:
        print(json.dumps(what), file=output, flush=True)

    say("Loading")
    order = read_json(Path(work, ORDER))
    how = {}
    if order["quantization"] is not None:
        how["quantization"] = QuantizationConfig.from_dict(order["quantization"])
    lm = load(Path(work, PRESET), **how)
    module, name = order["build"]
    build = getattr(importlib.import_module(module), name)
    build(lm, Path(order["directory"]), say, **order["options"])
