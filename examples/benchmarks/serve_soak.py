"""Mixed load with faults for a long time: wrong answers, slots in use, memory of the server."""

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from serve_client import Answer, Body, complete
from serve_start import Server

KINDS = {
    "answer": (0.7, 200),
    "leave": (0.12, 200),
    "oversized": (0.03, 413),
    "not JSON": (0.05, 400),
    "invalid value": (0.05, 400),
    "unknown model": (0.05, 404),
}
"""Kind of request to its share, and the expected status."""

OVERSIZED_BYTES = 20_000_000
FAILURE = "The server failed to answer"
"""Beginning of the message of an answer that an exception of the model has ended."""
MEMORY_SECONDS = 10
"""Time between two readings of the memory."""
SETTLE_SECONDS = 2
"""Time from the last request to the count of slots in use."""


def growth(readings: list[float]) -> float | None:
    """Returns the growth of the memory from the second tenth of the readings to the last one.

    In the first tenth, programs are compiled.
    """
    tenth = len(readings) // 10
    if not tenth:
        return None
    return round(sum(readings[-tenth:]) / sum(readings[tenth : 2 * tenth]) - 1, 4)


class Soak:
    """Mixed load with faults.

    Args:
        client: HTTP client.
        server: The server.
        bodies: Bodies of valid requests.
        endless: Body of a request with a long answer, for a client that stops reading.
        num_clients: Number of clients.
        seconds: Time of the load.
        may_fail: True if the model raises exceptions.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        server: Server,
        bodies: list[Body],
        endless: Body,
        num_clients: int,
        seconds: float,
        may_fail: bool = False,
    ) -> None:
        self.client, self.server = client, server
        self.bodies, self.endless = bodies, endless
        self.num_clients, self.seconds, self.may_fail = num_clients, seconds, may_fail
        self.expected: list[str] = []
        self.counts: Counter[str] = Counter()
        self.unexpected: Counter[str] = Counter()
        self.readings: list[float] = []

    async def run(self) -> dict[str, Any]:
        """Returns counts, readings of the memory, and the use of slots at the end."""
        for body in self.bodies:
            answer = await complete(self.client, body)
            while self._has_failed(answer):
                answer = await complete(self.client, body)
            if answer.error:
                raise RuntimeError(f"{self.server.name} answered: {answer.error}")
            self.expected.append(answer.text)
        end = time.monotonic() + self.seconds
        workers = [self._work(random.Random(i), end) for i in range(self.num_clients)]
        await asyncio.gather(*workers, self._read_memory(end), self._stop_a_client(end))
        await asyncio.sleep(SETTLE_SECONDS)
        return {
            "seconds": self.seconds,
            "counts": dict(self.counts),
            "unexpected": dict(self.unexpected),
            "memory": self.readings,
            "memory_growth": growth(self.readings),
            "left": await self._in_use(),
        }

    async def _work(self, generator: random.Random, end: float) -> None:
        shares = [share for share, _ in KINDS.values()]
        while time.monotonic() < end:
            (kind,) = generator.choices(list(KINDS), shares)
            self.counts[kind] += 1
            number = generator.randrange(len(self.bodies))
            body = self.bodies[number]
            if kind in ("answer", "leave"):
                leave = generator.randrange(4) if kind == "leave" else None
                answer = await complete(self.client, body, leave)
                status = answer.status
                if not self.expected[number].startswith(answer.text):
                    self.unexpected[f"{kind}: another text"] += 1
                elif self._has_failed(answer):
                    self.counts["failed"] += 1
                    continue
                elif answer.error:
                    self.unexpected[f"{kind}: {status} {answer.error}"] += 1
                elif answer.is_complete and answer.text != self.expected[number]:
                    self.unexpected[f"{kind}: a shorter text"] += 1
            else:
                status = await self._post_invalid(kind, body)
            if status != KINDS[kind][1]:
                self.unexpected[f"{kind}: status {status}"] += 1

    def _has_failed(self, answer: Answer) -> bool:
        """Returns True if an exception of the model has ended the answer, as is allowed."""
        return self.may_fail and (answer.error or "").startswith(FAILURE)

    async def _post_invalid(self, kind: str, body: Body) -> int:
        if kind == "oversized":
            content = json.dumps({**body, "prompt": "x" * OVERSIZED_BYTES})
        elif kind == "not JSON":
            content = json.dumps(body)[:-3]
        elif kind == "invalid value":
            content = json.dumps({**body, "temperature": -1})
        else:
            content = json.dumps({**body, "model": "unknown"})
        headers = {"Content-Type": "application/json"}
        try:
            response = await self.client.post("/v1/completions", content=content, headers=headers)
        except httpx.NetworkError:
            # The server answers and closes the connection while the body is on its way.
            return 413 if kind == "oversized" else 0
        except httpx.HTTPError:
            return 0
        return response.status_code

    async def _read_memory(self, end: float) -> None:
        while time.monotonic() < end:
            if self.server.process is not None:
                self.readings.append(self.server.memory())
            await asyncio.sleep(min(MEMORY_SECONDS, self.seconds / 10))

    async def _stop_a_client(self, end: float) -> None:
        """Stops a client while it reads, continues it, stops it again, and ends it."""
        script = str(Path(__file__).parent / "serve_client.py")
        url = f"{self.server.url}/v1/completions"
        names = [name for name in self.client.headers if name == "authorization"]
        headers = [f"{name}={self.client.headers[name]}" for name in names]
        while time.monotonic() < end:
            self.counts["stopped client"] += 1
            command = [sys.executable, script, url, json.dumps(self.endless), *headers]
            process = subprocess.Popen(command)
            for signal_number in (signal.SIGSTOP, signal.SIGCONT, signal.SIGSTOP, signal.SIGKILL):
                await asyncio.sleep(min(2.0, self.seconds / 8))
                process.send_signal(signal_number)
            process.wait()

    async def _in_use(self) -> dict[str, float]:
        """Returns requests and slots in use, from /metrics."""
        response = await self.client.get("/metrics")
        names = (
            "num_requests_running",
            "num_requests_waiting",
            "slots_used",
            "engine_restarts_total",
        )
        lines = response.text.splitlines() if response.status_code == 200 else []
        return {
            name: float(line.rpartition(" ")[2])
            for line in lines
            for name in names
            if line.startswith(f"keras_gemma_{name}{{")
        }
