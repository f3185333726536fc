"""Export in this process, or in a subprocess on the backend that the format needs.

A temporary folder holds the model as a preset, and a task in JSON. Each line that the subprocess
prints reports a stage. Knows nothing about formats.
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

from keras_gemma.extras import check_export
from keras_gemma.progress import bar
from keras_gemma.quantization import QuantizationConfig
from keras_gemma.storage.files import read_json, write_json
from keras_gemma.text.preprocessor import require_preprocessor

STAGES = 9
"""Approximate number of progress stages of an export."""

PRESET, TASK = "preset", "task.json"

PROGRAM = """
import os, sys
lines = os.dup(1)
os.dup2(2, 1)  # output of libraries is not for the parent
sys.path[:] = {path!r}
import keras_gemma
from keras_gemma.export import subprocess_export
subprocess_export.worker_main(sys.argv[1], lines, keras_gemma.GemmaCausalLM.from_preset)
"""

STDERR_TAIL = 2000
"""Characters of a failed subprocess's error output that are shown."""


def check(lm: Any, format: str) -> None:
    """Checks that a model has a preprocessor, and that the packages of `format` are installed."""
    require_preprocessor(lm.preprocessor, "an export", None)
    check_export(format)


def make(
    build: Callable[..., None],
    lm: Any,
    directory: Path,
    backend: str,
    quantization: QuantizationConfig | None = None,
    **options: Any,
) -> None:
    """Calls `build(lm, directory, report, **options)` on the Keras backend `backend`.

    `build`, a function of a module, fills the empty folder `directory` and calls `report` with each
    stage. `options` are JSON values.
    """
    in_process = keras.config.backend() == backend and quantization is None
    check_disk_space(lm, directory, copies=1 if in_process else 2)
    with bar("Exporting", STAGES) as advance:

        def report(stage: str) -> None:
            advance(1, stage)

        if in_process:
            build(lm, directory, report, **options)
            return
        with tempfile.TemporaryDirectory(prefix=".model.", dir=directory.parent) as work:
            report("Writing weights")
            lm.save_to_preset(Path(work, PRESET))
            task = {
                "build": [build.__module__, build.__name__],
                "directory": str(directory.resolve()),
                "quantization": None if quantization is None else quantization.to_dict(),
                "options": options,
            }
            write_json(Path(work, TASK), task)
            report(f"Starting KERAS_BACKEND={backend}")
            run_in_subprocess(Path(work), backend, report)


def check_disk_space(lm: Any, directory: Path, copies: int) -> None:
    """Raises an OSError if the disk has no space for `copies` copies of the weights."""
    needed = copies * sum(weight.bytes for weight in lm.backbone.named_weights().values())
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"The export needs {needed / 1e6:,.0f} MB on the disk of `path`, and "
            f"{free / 1e6:,.0f} MB are free. Free some space, or choose a path on another disk",
            str(directory.parent.parent),
        )


def run_in_subprocess(work: Path, backend: str, report: Callable[[str], None]) -> None:
    """Runs the task in the folder `work` in a subprocess on `backend`."""
    environ = {"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ, "KERAS_BACKEND": backend}
    environ.pop("XLA_FLAGS", None)  # a framework may reject the flags of another one
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
                report(json.loads(line))
            process.wait()
        finally:
            process.kill()  # in case this process was interrupted
    if process.returncode:
        output = errors.read_text(encoding="utf-8", errors="replace").strip()
        raise RuntimeError(
            f"The export subprocess with KERAS_BACKEND={backend} exited with code "
            f"{process.returncode}. Its error output ends with:\n{output[-STDERR_TAIL:]}"
        )


def worker_main(work: str, lines: int, load: Callable[..., Any]) -> None:
    """Runs the task in the folder `work`, in the subprocess. Reports to the descriptor `lines`.

    `load` is `from_preset` of the model class, which this folder does not import.
    """
    output = os.fdopen(lines, "w", encoding="utf-8")

    def report(stage: str) -> None:
        print(json.dumps(stage), file=output, flush=True)

    report("Loading")
    task = read_json(Path(work, TASK))
    arguments = {}
    if task["quantization"] is not None:
        arguments["quantization"] = QuantizationConfig.from_dict(task["quantization"])
    lm = load(Path(work, PRESET), **arguments)
    module, name = task["build"]
    build = getattr(importlib.import_module(module), name)
    build(lm, Path(task["directory"]), report, **task["options"])
