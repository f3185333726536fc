"""The child processes of `programs.py`: one runs the program, the other one its test.

Runs without this package, so it imports only the standard library and `fences.py`.

    supervisor             in the new namespaces, except that of process ids and with the old root;
                           waits, and kills the rest at the time limit
      first process        behind the fences: the program, or the test

The test's process does not contain the program: it asks the program's process for values, over a
socket, one line of JSON a message. Values travel as plain data: numbers, strings, lists, tuples,
sets, dicts. Other objects stay in the program's process, and the test gets a `Remote`.
"""

import contextlib
import io
import json
import os
import select
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

import fences

PASSED, FAILED, TIMED_OUT, UNFENCED = 0, 1, 124, 125
"""Exit codes of the test's process and of its supervisor."""

MAX_MESSAGE = 64 << 20
"""Maximum length of a message, in bytes."""

MAX_REASON = 300
"""Maximum length of a reason, in characters."""

SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


class ProgramError(Exception):
    """An exception of the program, or a value that cannot travel."""


def encode(value: Any, keep: Callable[[Any], int]) -> Any:
    """Returns `value` as JSON data. `keep` stores an object that cannot travel, for an id."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, bytes | bytearray):
        return ["bytes", value.hex()]
    for tag, kind in SEQUENCES.items():
        if isinstance(value, kind):
            return [tag, [encode(item, keep) for item in value]]
    if isinstance(value, dict):
        return ["dict", [[encode(key, keep), encode(value[key], keep)] for key in value]]
    return ["object", keep(value)]


def decode(data: Any, find: Callable[[int], Any]) -> Any:
    """Returns the value of JSON data. `find` returns the object of an id."""
    if not isinstance(data, list):
        return data
    tag, *content = data
    if tag == "complex":
        return complex(*content)
    if tag == "bytes":
        return bytes.fromhex(content[0])
    if tag in SEQUENCES:
        return SEQUENCES[tag](decode(item, find) for item in content[0])
    if tag == "dict":
        return {decode(key, find): decode(value, find) for key, value in content[0]}
    return find(content[0])


# The program's side


def serve(program: str, link: io.BufferedRWPair) -> None:
    """Runs `program`, then answers the test's requests for its values until the link closes."""
    module = types.ModuleType("program")
    sys.modules["program"] = module
    objects: list[Any] = []

    def keep(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    def answer(operation: str, *arguments: Any) -> Any:
        if operation == "run":
            return exec(compile(program, "<program>", "exec"), module.__dict__)
        if operation == "global":
            return vars(module)[arguments[0]]
        target, *rest = arguments
        if operation == "call":
            return target(*rest[0], **rest[1])
        if operation == "setattr":
            return setattr(target, *rest)
        return {"getattr": getattr, "iterate": list}[operation](target, *rest)

    for line in iter(link.readline, b""):
        try:
            request = decode(json.loads(line), objects.__getitem__)
            reply = {"value": encode(answer(*request), keep)}
        except BaseException as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:MAX_REASON]}
        link.write(json.dumps(reply).encode() + b"\n")
        link.flush()


# The test's side


class Program:
    """The program's process, as the test's process sees it."""

    def __init__(self, link: io.BufferedRWPair) -> None:
        self.link = link

    def ask(self, *request: Any) -> Any:
        self.link.write(json.dumps(encode(request, self.id_of)).encode() + b"\n")
        self.link.flush()
        line = self.link.readline(MAX_MESSAGE)
        if not line.endswith(b"\n"):
            raise ProgramError("the program ended early, or its answer is too long")
        reply = json.loads(line)
        if "error" in reply:
            raise ProgramError(str(reply["error"])[:MAX_REASON])
        return decode(reply["value"], lambda id: Remote(self, id))

    def id_of(self, value: Any) -> int:
        if type(value) is not Remote:
            raise ProgramError(f"the test passes an object of type {type(value).__name__}")
        return object.__getattribute__(value, "_remote_id")


class Remote:
    """An object of the program's process, such as its function.

    Comparisons are never the program's: an object equals itself. It has no truth value.
    """

    def __init__(self, program: Program, id: int) -> None:
        object.__setattr__(self, "_remote_program", program)
        object.__setattr__(self, "_remote_id", id)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _program(self).ask("call", self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return _program(self).ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _program(self).ask("setattr", self, name, value)

    def __iter__(self) -> Iterator[Any]:
        return iter(_program(self).ask("iterate", self))

    def __bool__(self) -> bool:
        raise ProgramError("the program returns an object that is not plain data")


def _program(remote: Remote) -> Program:
    return object.__getattribute__(remote, "_remote_program")


def check(job: dict[str, Any], link: io.BufferedRWPair) -> tuple[int, str]:
    """Runs the test of a program. Returns the exit code, and the reason if it fails."""
    program = Program(link)
    try:
        program.ask("run")
        namespace: dict[str, Any] = {"__name__": "test"}
        exec(compile(job["setup"], "<setup>", "exec"), namespace)
        for name in job["names"]:
            namespace[name] = program.ask("global", name)
        exec(compile(job["test"], "<test>", "exec"), namespace)
    except BaseException as error:
        return FAILED, describe(error, job["test"].splitlines())
    return PASSED, ""


def describe(error: BaseException, lines: list[str]) -> str:
    """Returns an exception in one line, with the test's line for a failed assertion."""
    if isinstance(error, ProgramError):
        return str(error)
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == "<test>"]
    if frames and isinstance(error, AssertionError):
        text = f"failed: {lines[frames[-1].lineno - 1].strip()}"
    return text[:MAX_REASON]


# Processes


def first_process(job: dict[str, Any], missing: dict[str, str], in_namespaces: bool) -> int:
    """Raises the fences, then does the job. Returns the exit code."""
    os.setsid()  # so that the program's signals to its group do not reach the supervisor
    report = os.dup(2)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)
    missing = missing | fences.raise_fences(job["directory"], job["seconds"], in_namespaces)
    if job["role"] == "report":
        os.write(report, json.dumps(missing).encode())
        return PASSED
    if missing and not job["unsafe"]:
        os.write(report, "; ".join(f"{name}: {why}" for name, why in missing.items()).encode())
        return UNFENCED
    link = io.BufferedRWPair(io.FileIO(job["link"], "rb"), io.FileIO(os.dup(job["link"]), "wb"))
    if job["role"] == "program":
        os.close(report)
        serve(job["program"], link)
        return PASSED
    code, reason = check(job, link)
    os.write(report, reason.encode(errors="backslashreplace"))
    return code


def supervise(job: dict[str, Any]) -> int:
    """Starts the first process and returns its exit code, or kills it at the time limit.

    The parent holds the other end of standard input: when the parent ends, so do the processes.
    """
    # The program's process waits longer, so that the test's process reports the time limit.
    deadline = time.monotonic() + job["seconds"] + (job["role"] == "program")
    missing = {}
    try:
        fences.enter_namespaces()
        fences.forbid_tracing()
    except OSError as error:
        missing["namespaces"] = error.strerror or str(error)
    pid = os.fork()
    if pid == 0:
        code = FAILED
        try:
            code = first_process(job, missing, not missing)
        finally:
            os._exit(code)
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            kill_group(pid)
            return os.waitstatus_to_exitcode(status) % 256
        parent_ended = bool(select.select([0], [], [], 0.002)[0])
        if parent_ended or time.monotonic() > deadline:
            kill_group(pid)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return TIMED_OUT


def kill_group(pid: int) -> None:
    """Kills what is left of the first process's group. A PID namespace needs no such help."""
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)


def main() -> None:
    """Does the job that the parent writes to standard input, one line of JSON."""
    sys.set_int_max_str_digits(0)
    job = json.loads(sys.stdin.buffer.readline())
    os._exit(supervise(job))
