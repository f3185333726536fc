"""Runs programs in new processes in which one framework is installed, and no other.

`python tests/one_framework.py jax` reads a JSON string per line, a program, and prints the tail of
its error output as JSON: an empty string if it succeeded. A program has an empty home, an empty
current folder and no KERAS_BACKEND. It is a fork of this process, which has imported what every
program needs, but neither Keras nor this package.
"""

import importlib
import importlib.machinery
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

FRAMEWORKS = {
    "jax": ("jax", "jaxlib"),
    "torch": ("torch",),
    "tensorflow": ("tensorflow", "tensorflow_text", "tf_keras"),
}
PRELOADED = ("numpy", "h5py", "ml_dtypes", "optree", "rich.console", "safetensors", "sentencepiece")
TAIL = 1500
"""Characters of the error output that are returned."""


class PathFinderWithout:
    """Python's finder of installed packages, which does not find some of them."""

    def __init__(self, hidden: set[str]) -> None:
        self.hidden = hidden

    def find_spec(self, name: str, *arguments: Any) -> Any:
        if name.partition(".")[0] in self.hidden:
            return None
        return importlib.machinery.PathFinder.find_spec(name, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.machinery.PathFinder, name)


def hide_other_frameworks(framework: str) -> None:
    hidden = {name for names in FRAMEWORKS.values() for name in names}
    finder = PathFinderWithout(hidden - set(FRAMEWORKS[framework]))
    sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = finder


def run(program: str) -> str:
    """Runs a program in a fork, and returns the tail of its error output if it failed."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if not child:
            code = 1
            try:
                os.chdir(folder)
                os.environ["HOME"] = folder
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(errors.fileno(), 2)
                exec(compile(program, "example", "exec"), {"__name__": "__main__"})
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            return ""
        errors.seek(0)
        return errors.read()[-TAIL:] or "it was killed"


def main(framework: str) -> None:
    for name in [name for name in os.environ if name.startswith("KERAS_")]:
        del os.environ[name]
    hide_other_frameworks(framework)
    sys.path[0] = str(Path(__file__).parents[1])
    for name in (*PRELOADED, framework):
        importlib.import_module(name)
    if framework == "jax":
        importlib.import_module("jax").config.update("jax_disable_most_optimizations", True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
