"""A client of OpenAI's /v1/completions that takes the time of every event.

As a program, it reads one endless stream after another, for tests in which it is stopped:

    python examples/benchmarks/serve_client.py http://127.0.0.1:8000/v1/completions '{...}'
"""

import dataclasses
import itertools
import json
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import httpx

Body = dict[str, Any]
"""Body of a request."""


@dataclasses.dataclass
class Answer:
    """Result of one request. Times are seconds of `time.perf_counter`."""

    start: float
    status: int = 0
    """HTTP status, or 0 if there was none."""
    error: str | None = None
    text: str = ""
    events: list[float] = dataclasses.field(default_factory=list)
    """Time of each event with text."""
    end: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str | None = None
    was_cancelled: bool = False
    """True if the client left before the end."""

    @property
    def is_complete(self) -> bool:
        return self.error is None and not self.was_cancelled

    @property
    def first(self) -> list[float]:
        """Seconds to the first text, if there was a text."""
        return [event - self.start for event in self.events[:1]]

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def gaps(self) -> list[float]:
        """Seconds between events."""
        return [b - a for a, b in itertools.pairwise(self.events)]


async def data_of(response: httpx.Response) -> AsyncIterator[str]:
    """Yields the data of server-sent events. httpx's own lines end at some characters of texts."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode()


async def complete(client: httpx.AsyncClient, body: Body, max_events: int | None = None) -> Answer:
    """Returns the answer to a streamed request.

    Args:
        client: HTTP client with the address of the server.
        body: Body of the request.
        max_events: Number of events after which the client leaves. `None` reads all.
    """
    answer = Answer(start=time.perf_counter())
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            answer.status = response.status_code
            if response.status_code != 200:
                answer.error = message_of(await response.aread())
            elif not await read(response, answer, max_events) and not answer.was_cancelled:
                answer.error = answer.error or "the stream had no end"
    except httpx.HTTPError as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.end = time.perf_counter()
    answer.completion_tokens = answer.completion_tokens or len(answer.events)
    return answer


async def read(response: httpx.Response, answer: Answer, max_events: int | None) -> bool:
    """Reads a stream into `answer`, and returns True if it had an end."""
    async for data in data_of(response):
        if data == "[DONE]":
            return True
        event = json.loads(data)
        if "error" in event:
            answer.error = event["error"]["message"]
            return False
        for choice in event.get("choices", ()):
            if choice["text"]:
                answer.events.append(time.perf_counter())
                answer.text += choice["text"]
            answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
        if usage := event.get("usage"):
            answer.prompt_tokens = usage["prompt_tokens"]
            answer.completion_tokens = usage["completion_tokens"]
        if max_events is not None and len(answer.events) >= max_events:
            answer.was_cancelled = True
            return False
    return False


def message_of(body: bytes) -> str:
    """Returns the message of an error in OpenAI's format, or the start of another body."""
    try:
        return json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")


def main() -> None:
    url, body = sys.argv[1:3]
    headers = {"Content-Type": "application/json", **dict(p.split("=", 1) for p in sys.argv[3:])}
    while True:
        try:
            request = urllib.request.Request(url, body.encode(), headers)
            with urllib.request.urlopen(request, timeout=60) as response:
                while response.read(64):
                    pass
        except OSError:
            time.sleep(0.2)


if __name__ == "__main__":
    main()
