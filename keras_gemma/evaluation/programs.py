"""Programs made by a model, run apart: HumanEval, MBPP, pass@k.

Knows no model and no lm-eval. A program is hostile until its test shows otherwise.

    this process  --->  test's process       the verdict is its exit code
                            | questions, answers as plain data
                        program's process

Both processes are Python without packages, behind the fences of `fences.py`. A program has 5 s, and
what it prints is discarded.

**The verdict.** The program's process never holds the expected values, and the test's process never
holds an object of the program. Therefore these do not pass a test: an early exit, a printed
verdict, changed builtins, objects that equal everything, a search of the caller's frames. To pass,
the program must answer the test's calls with the right values. Differences from a test in the same
process: the test does not see changes of its arguments in place, cannot pass functions, and gets
plain `list`, `dict` and so on for their subclasses.

**Remaining risks.** The fences are those of the kernel: a fault in it opens them. They do not hide
the processor's model, the clock, or Python's library. A program may use up to 8 processes of 1 GiB
each for 5 s. With `unsafe=True`, fences that the system lacks are left out: a program may then read
and write the user's files, use the network, kill or trace other processes of the user, and leave
processes behind. Do that only in a container or a virtual machine without secrets.
"""

import ast
import builtins
import contextlib
import functools
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keras_gemma.checks import check_integer

SECONDS = 5.0
"""Time limit of a program with its test, in seconds."""

FENCES = ("namespaces", "landlock", "privileges", "limits")
"""Fences in the order in which they are raised. `fences.py` describes them."""

HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")
"""Strings that end a completion of HumanEval. A fence ends the reply of a chat model."""

MBPP_STOPS = ("[DONE]", "\n```")
"""Strings that end a completion of MBPP."""

PASSED, TIMED_OUT, UNFENCED = 0, 124, 125
"""Exit codes of the child processes. `program_child.py` defines them."""

CHILD = (
    f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r});"
    "from program_child import main; del sys.path[0]; main()"
)
"""Program of a child process."""


@dataclass(frozen=True)
class ProgramResult:
    """Verdict on a program: `passed`, the `reason` if it failed, and its time in `seconds`."""

    passed: bool
    reason: str
    seconds: float


def run_program(
    program: str,
    test: str,
    names: Sequence[str] | None = None,
    setup: str = "",
    seconds: float = SECONDS,
    unsafe: bool = False,
) -> ProgramResult:
    """Runs `program` apart from everything, then `test` with the program's names.

    Args:
        program: Source of the program, not trusted.
        test: Source of the test, such as `"assert add(2, 3) == 5"`. It passes if it raises nothing.
        names: Names that the test takes from the program. `None` takes those that the test reads
            and does not define, except builtins.
        setup: Source that runs in the test's process before, such as imports and helpers.
        seconds: Time limit of both.
        unsafe: If True, fences that this system lacks are left out.

    Returns:
        The verdict. A program that fails in any way is a result, not an exception.

    Raises:
        ValueError: If a fence does not hold here and `unsafe` is False.
    """
    check_fences(unsafe)
    names = free_names(test) if names is None else list(names)
    limits = {"seconds": seconds, "unsafe": unsafe}
    start = time.monotonic()
    ends = socket.socketpair()
    children = []
    with contextlib.ExitStack() as stack:
        questions = {"role": "test", "setup": setup, "test": test, "names": names}
        answers = {"role": "program", "program": program}
        for end, job in zip(ends, (answers, questions), strict=True):
            job["link"] = end.fileno()
            with end:
                children.append(stack.enter_context(start_child(job | limits)))
        program_child, test_child = children
        reason = test_child.stderr.read()
        test_child.wait()
        elapsed = time.monotonic() - start
        _, program_reason = program_child.communicate()  # closes its input, which ends it
    for child, why in ((test_child, reason), (program_child, program_reason)):
        if child.returncode == UNFENCED and why:  # A program may exit with that code too.
            raise ValueError(f"A fence around the program does not hold: {why}")
    if test_child.returncode == TIMED_OUT:
        reason = f"timed out after {seconds:g} s"
    return ProgramResult(test_child.returncode == PASSED, reason, elapsed)


@contextlib.contextmanager
def start_child(job: dict[str, Any]) -> Iterator[subprocess.Popen]:
    """Starts a child for a job. Its processes are killed when the block ends, or this process."""
    with tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as directory:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[job["link"]] if "link" in job else (),
            env={},
            cwd="/",
            start_new_session=True,
            text=True,
            errors="replace",
        )
        try:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(json.dumps(job | {"directory": directory}) + "\n")
                child.stdin.flush()
            yield child
        finally:
            for stream in (child.stdin, child.stderr):
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
            child.wait()


def run_all(
    check: Callable[[Mapping[str, Any], str], ProgramResult],
    docs: Sequence[Mapping[str, Any]],
    completions: Sequence[str],
    workers: int | None = None,
) -> list[ProgramResult]:
    """Returns the verdict of `check`, such as `check_mbpp`, on each completion of its document.

    Args:
        check: Function of a document and a completion.
        docs: Documents, one per completion.
        completions: Texts of the model.
        workers: Programs that run at the same time. `None` is the number of processors that this
            process may use.
    """
    if workers is None:
        has_affinity = hasattr(os, "sched_getaffinity")
        workers = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    pairs = list(zip(docs, completions, strict=True))
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda pair: check(*pair), pairs))


def check_humaneval(doc: Mapping[str, Any], completion: str, unsafe: bool = False) -> ProgramResult:
    """Returns the verdict on a completion of a HumanEval prompt.

    The program is the prompt and the completion, up to the first of `HUMANEVAL_STOPS`. The test's
    helpers come from the prompt, so that the completion cannot replace them.

    Args:
        doc: Item of the data set, with `prompt`, `test` and `entry_point`.
        completion: Text of the model after the prompt.
        unsafe: Same as in `run_program`.
    """
    name = doc["entry_point"]
    return run_program(
        doc["prompt"] + cut(completion, HUMANEVAL_STOPS),
        f"{doc['test']}\ncheck({name})",
        [name],
        doc["prompt"],
        unsafe=unsafe,
    )


def check_mbpp(doc: Mapping[str, Any], completion: str, unsafe: bool = False) -> ProgramResult:
    """Returns the verdict on a program for an item of MBPP.

    The program is the completion up to the first of `MBPP_STOPS`, without a fence that opens it.
    The test may use the imports of the reference program, and takes the functions and classes that
    the reference defines from the completion.

    Args:
        doc: Item of the data set, with `code`, `test_list` and `test_setup_code`.
        completion: Text of the model.
        unsafe: Same as in `run_program`.
    """
    test = "\n".join([doc.get("test_setup_code", ""), *doc["test_list"]])
    program = cut(re.sub(r"\A\s*```\w*\n", "", completion), MBPP_STOPS)
    defined = {node.name for node in ast.parse(doc["code"]).body if hasattr(node, "name")}
    names = sorted(defined & names_read(test))
    return run_program(program, test, names, doc["code"], unsafe=unsafe)


def cut(text: str, stops: Sequence[str]) -> str:
    """Returns `text` up to the first of the strings `stops`."""
    return text[: min(position % (len(text) + 1) for position in map(text.find, stops))]


def names_read(source: str) -> set[str]:
    """Returns the names whose values `source` reads."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
    return {node.id for node in nodes if isinstance(node.ctx, ast.Load)}


def free_names(test: str) -> list[str]:
    """Returns the names that `test` reads and does not define, except builtins."""
    defined: set[str | None] = set(dir(builtins))
    for node in ast.walk(ast.parse(test)):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            defined.add(node.id)
        elif isinstance(node, ast.alias):
            defined.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler):
            defined.add(node.name)
    return sorted(names_read(test) - defined)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Returns the unbiased estimate of the probability that one of `k` samples passes.

    It is the share of all choices of `k` samples with one that passes (arXiv:2107.03374, section
    2.1).

    Args:
        n: Number of samples.
        c: Number of samples that pass.
        k: Size of a choice, at most `n`.
    """
    check_integer("n", n)
    check_integer("c", c, 0, n)
    check_integer("k", k, 1, n)
    return 1 - math.comb(n - c, k) / math.comb(n, k)


@functools.cache
def missing_fences() -> dict[str, str]:
    """Returns the fences that do not hold on this system, with the reason. Tries them once."""
    if not hasattr(os, "fork"):
        return dict.fromkeys(FENCES, "the system is not Linux")
    with start_child({"role": "report", "seconds": SECONDS}) as child:
        text = child.stderr.read()
    try:
        return json.loads(text)
    except ValueError:
        reason = text.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
        return dict.fromkeys(FENCES, f"the child process failed: {reason[0]}")


def describe_fences() -> str:
    """Returns a line on the fences that hold here and those that do not."""
    missing = missing_fences()
    parts = [
        f"{name} {'no (' + missing[name] + ')' if name in missing else 'yes'}" for name in FENCES
    ]
    return f"fences around programs: {', '.join(parts)}"


def check_fences(unsafe: bool = False) -> None:
    """Checks that programs can run here.

    Args:
        unsafe: If True, a system that lacks fences passes, unless it cannot run programs at all.

    Raises:
        ValueError: If a fence does not hold.
    """
    missing = missing_fences()
    if not missing or (unsafe and hasattr(os, "fork")):
        return
    reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
    if not hasattr(os, "fork"):
        raise ValueError(
            "`run_programs` needs Linux or macOS. Use a container. "
            f"Received: run_programs on {sys.platform}"
        )
    raise ValueError(
        "`run_programs` needs Linux with user namespaces and Landlock, because a model's programs "
        "may do anything. In a container or a virtual machine without secrets, pass "
        f"run_programs='unsafe'. Missing fences: {reasons}"
    )
