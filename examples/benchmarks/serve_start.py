"""Servers as child processes."""

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from child import cpu_seconds, memory

SERVERS = ("ours", "one-at-a-time", "llama.cpp", "llama.cpp-slots")


class Server:
    """A server: a child process, or only an address."""

    def __init__(self, name: str, url: str, process: subprocess.Popen | None = None) -> None:
        self.name, self.url, self.process = name, url, process

    def memory(self) -> float | None:
        """Returns the memory of the process in bytes, or `None` if it is not a child."""
        return memory("VmRSS", self.process.pid) if self.process else None

    def cpu_seconds(self) -> float | None:
        return cpu_seconds(self.process.pid) if self.process else None


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def command_of(name: str, port: int, options: argparse.Namespace) -> list[str]:
    """Returns the command that starts a server."""
    precision = [
        word
        for key in ("dtype", "quantization")
        if (value := getattr(options, key))
        for word in (f"--{key}", value)
    ]
    gguf = options.gguf or options.model
    threads = str(len(os.sched_getaffinity(0)))
    children = str(Path(__file__).parent / "serve_children.py")
    faulty = str(Path(__file__).parent / "serve_faulty.py")
    ours = [faulty] if options.faults else ["-m", "keras_gemma"]
    slots = str(options.slots or options.clients)
    python, at = sys.executable, ["--port", str(port)]
    commands = {
        "ours": [
            *(python, *ours, "serve", options.model, *at, "--max-batch-size", slots),
            *precision,
            *options.serve_options.split(),
        ],
        "one-at-a-time": [python, children, "one-at-a-time", options.model, *at, *precision],
        "llama.cpp-slots": [
            *(python, children, "llama.cpp-slots", gguf, *at),
            *("--slots", slots, "--threads", threads),
        ],
        "llama.cpp": [
            *(python, "-m", "llama_cpp.server", "--model", gguf, *at),
            *("--n_ctx", "4096", "--n_threads", threads, "--n_threads_batch", threads),
            *("--interrupt_requests", "false"),
        ],
    }
    return commands[name]


@contextlib.contextmanager
def started(name: str, options: argparse.Namespace) -> Iterator[Server]:
    """Runs a server as a child process, until it is ready and then to the end of the block."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    faults = {"SERVE_FAULTS": str(options.faults), "SERVE_FAULT_SEED": str(options.seed)}
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **faults}
    if options.backend:
        environment["KERAS_BACKEND"] = options.backend
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command_of(name, port, options), env=environment, stdout=log, stderr=log
        )
        try:
            deadline = time.monotonic() + options.limit
            while not is_ready(url, options):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    last = log.read()[-2000:].decode(errors="replace")
                    raise RuntimeError(f"{name} did not start:\n{last}")
                time.sleep(0.2)
            yield Server(name, url, process)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def headers_of(options: argparse.Namespace) -> dict[str, str]:
    return {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}


def is_ready(url: str, options: argparse.Namespace) -> bool:
    """Returns True if a server answers. llama.cpp's has no /ready, and is ready when it listens."""
    try:
        response = httpx.get(f"{url}/ready", headers=headers_of(options), timeout=5)
    except httpx.HTTPError:
        return False
    return response.status_code in (200, 404)
