"""Measurement in a subprocess, memory of a process (Linux), and options of several scripts.

Imports no other library before a function needs it.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any


def add_common_arguments(
    parser: argparse.ArgumentParser, layers: int, libraries: list[str]
) -> None:
    """Adds the options that compare.py and finetune.py share, with these defaults."""
    parser.add_argument("--shape", default="gemma2_2b_en")
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--libraries", nargs="+", default=libraries, choices=libraries)
    parser.add_argument("--backends", nargs="+", default=["jax", "torch", "tensorflow"])
    parser.add_argument("--limit", type=int, default=600, help="time limit of a line, in seconds")
    parser.add_argument("--one", help=argparse.SUPPRESS)


def gguf_path(options: argparse.Namespace) -> Path:
    """Returns the GGUF file of `--model`, a preset name or a path."""
    from keras_gemma.storage.hub.locate import resolve

    return resolve(options.model)


def memory(name: str, process: int | str = "self") -> float:
    """Returns bytes of a process: `"VmRSS"` now, or `"VmHWM"`, the peak since `reset_peak`."""
    path = Path(f"/proc/{process}/status")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return float("nan")


def cpu_seconds(process: int | str = "self") -> float:
    """Returns the seconds of all cores that a process has used."""
    path = Path(f"/proc/{process}/stat")
    if not path.exists():
        return float("nan")
    # The name in parentheses may have spaces.
    fields = path.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def reset_peak() -> None:
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")


def run_command(command: list[str], backend: str | None, limit: float) -> dict[str, Any]:
    """Returns the last line that `command` prints, parsed as JSON, or `"error"` if it failed.

    Args:
        command: Program and its arguments.
        backend: Backend of Keras, or `None` for libraries without Keras.
        limit: Time limit in seconds.
    """
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "TOKENIZERS_PARALLELISM": "false"}
    if backend:
        environment["KERAS_BACKEND"] = backend
    try:
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no result within {limit} s"}
    if result.returncode < 0:
        return {"error": f"killed by signal {-result.returncode}, as when memory runs out"}
    if result.returncode:
        last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        return {"error": last}
    return json.loads(result.stdout.strip().splitlines()[-1])
