"""A measurement in a process of its own, which holds no other library's memory."""

import json
import os
import subprocess
from typing import Any


def figures_of(command: list[str], backend: str | None, limit: float) -> dict[str, Any]:
    """The last line that `command` prints, JSON; `"error"` in its place where it failed.

    Args:
        command: the program and its arguments.
        backend: of Keras, or None where it has none.
        limit: seconds that it may take.
    """
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "TOKENIZERS_PARALLELISM": "false"}
    if backend:
        environment["KERAS_BACKEND"] = backend
    try:
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {limit} s"}
    if result.returncode:
        last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        return {"error": last}
    return json.loads(result.stdout.strip().splitlines()[-1])
