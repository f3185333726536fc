"""Load of OpenAI-compatible servers: speed, latencies, and whether each text is the right one.

    python examples/benchmarks/serve.py --url http://127.0.0.1:8000
    python examples/benchmarks/serve.py --start ours one-at-a-time llama.cpp-slots \\
        --model gemma3_270m --dtype bfloat16 --gguf bf16.gguf --backend torch
    python examples/benchmarks/serve.py --start ours --arrivals poisson --rate 2 --cancel 0.2
    python examples/benchmarks/serve.py --start ours --scenarios interference idle
    python examples/benchmarks/serve.py --start ours --scenarios soak --seconds 3600 --faults 0.003

Starts each server as a child process, or uses a running one. Prompts are texts of about
`--prompt-tokens` tokens, or token ids with `--prompts ids`, and no two of them share a long prefix.
With `--start`, other requests come before the measurement, for which programs are compiled.

Scenarios:

    load          `--clients` that each send the next request when they have the last answer, or
                  Poisson arrivals at `--rate` per second. A part of the requests is canceled.
    interference  time to the first token of a short prompt while a long one is prefilled, and the
                  longest gap in a stream at that time
    idle          latency and memory with many idle connections
    soak          mixed load with clients that leave, stop reading or send invalid requests, for
                  `--seconds`: wrong answers, slots in use at the end, and memory. With `--faults`,
                  the model raises exceptions, and answers may also end with an error.

Columns of the load:

    tokens/s      new tokens of all requests per second
    first         time to the first text; p50, p90 and p99
    between       time between two events of a stream; p50 and p99
    whole         time to the end; p50, p90 and p99
    single        texts equal to those that the server returns to one client for the same request
    first server  texts equal to those of the first server in `--start`
    cores         cores that the server and this client used
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import random
import resource
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
from child import cpu_seconds
from serve_client import Answer, Body, complete
from serve_soak import Soak
from serve_start import SERVERS, Server, headers_of, started

SCENARIOS = ("load", "interference", "idle", "soak")
WORDS = (
    *("river", "mountain", "garden", "window", "summer", "winter", "letter", "morning", "evening"),
    *("silver", "golden", "forest", "island", "bridge", "market", "doctor", "teacher", "captain"),
    *("village", "kitchen", "library", "history", "science", "music", "painting", "journey"),
)


class Requests:
    """Bodies of requests, each with its own prompt and seed.

    Args:
        options: Options of the command.
        model: Name of the model.
        server: Name of the server in `--start`, or `None`.
    """

    def __init__(self, options: argparse.Namespace, model: str, server: str | None) -> None:
        self.options, self.model = options, model
        self.tokenizer = None
        if options.model:
            from keras_gemma import GemmaTokenizer

            self.tokenizer = GemmaTokenizer.from_preset(options.model)
        # llama.cpp's server has no switch for stop tokens: <eos> and <end_of_turn>.
        self.settings: Body = {"ignore_eos": True}
        if server == "llama.cpp":
            self.settings = {"logit_bias": {"1": -100.0, "106": -100.0, "107": -100.0}}

    def body(self, number: int, prompt_tokens: int = 0, max_tokens: int = 0) -> Body:
        """Returns a body. The same number gives the same one."""
        return {
            "model": self.model,
            "prompt": self._prompt(number, prompt_tokens or self.options.prompt_tokens),
            "max_tokens": max_tokens or self.options.new_tokens,
            "temperature": self.options.temperature,
            "seed": abs(number),
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.settings,
        }

    def _prompt(self, number: int, size: int) -> str | list[int]:
        generator = random.Random(number)
        if self.options.prompts == "ids":
            top = self.tokenizer.vocabulary_size() if self.tokenizer else 1000
            return [2, *(generator.randrange(top // 4, top // 2) for _ in range(size - 1))]
        words = [generator.choice(WORDS) for _ in range(size - 1)]
        if self.tokenizer is None:
            return " ".join(words)
        # Fewer words, if words have several tokens.
        while len(self.tokenizer.encode([" ".join(words)])[0]) >= size and len(words) > 1:
            extra = len(self.tokenizer.encode([" ".join(words)])[0]) - size + 1
            del words[-math.ceil(extra / 8) :]
        return " ".join(words)


def percentiles(values: list[float]) -> dict[str, float]:
    """Returns the 50th, 90th and 99th percentile, or an empty dict if there are no values."""
    ordered = sorted(values)
    places = {share: min(len(ordered) - 1, len(ordered) * share // 100) for share in (50, 90, 99)}
    return {f"p{share}": round(ordered[i], 4) for share, i in places.items() if ordered}


def short(figures: dict[str, float], *shares: int, unit: float = 1.0, digits: int = 2) -> str:
    """Returns percentiles as a cell of a table."""
    values = (figures[f"p{share}"] / unit for share in shares) if figures else ()
    return "/".join(f"{value:.{digits}f}" for value in values) or "-"


async def closed_loop(work: list[Callable[[], Awaitable[Answer]]], clients: int) -> list[Answer]:
    """Returns the answers of work that `clients` do, each one thing after the other."""
    answers: list[Any] = [None] * len(work)
    numbers = iter(range(len(work)))

    async def run() -> None:
        for number in numbers:
            answers[number] = await work[number]()

    await asyncio.gather(*(run() for _ in range(clients)))
    return answers


async def poisson_arrivals(
    work: list[Callable[[], Awaitable[Answer]]], rate: float, seed: int
) -> list[Answer]:
    """Returns the answers of work that starts at random times, `rate` per second on average."""
    generator = random.Random(seed)
    tasks = []
    for start in work:
        tasks.append(asyncio.ensure_future(start()))
        await asyncio.sleep(generator.expovariate(rate))
    return await asyncio.gather(*tasks)


async def load(
    client: httpx.AsyncClient, server: Server, requests: Requests, options: argparse.Namespace
) -> dict[str, Any]:
    """Returns the figures of the load, and the texts by number of the request."""
    generator = random.Random(options.seed)
    numbers = range(options.seed, options.seed + options.requests)
    bodies = [requests.body(number) for number in numbers]
    leaves = [
        generator.randrange(1, options.new_tokens) if generator.random() < options.cancel else None
        for _ in bodies
    ]

    def work(bodies: list[Body], leaves: list[int | None]) -> list[Any]:
        def task(body: Body, leave: int | None) -> Callable[[], Awaitable[Answer]]:
            return lambda: complete(client, body, leave)

        return [task(body, leave) for body, leave in zip(bodies, leaves, strict=True)]

    if server.process:
        others = [requests.body(-1 - number) for number in range(2 * options.clients)]
        await closed_loop(work(others, [None] * len(others)), options.clients)
    before, start = [cpu_seconds(), server.cpu_seconds()], time.perf_counter()
    tasks = work(bodies, leaves)
    if options.arrivals == "poisson":
        answers = await poisson_arrivals(tasks, options.rate, options.seed)
    else:
        answers = await closed_loop(tasks, options.clients)
    seconds = time.perf_counter() - start
    after = [cpu_seconds(), server.cpu_seconds()]
    cores = [
        None if a is None or b is None else round((b - a) / seconds, 2)
        for a, b in zip(before, after, strict=True)
    ]
    whole = [answer for answer in answers if answer.is_complete]
    figures = {
        "requests": len(answers),
        "canceled": sum(answer.was_cancelled for answer in answers),
        "errors": dict(Counter(answer.error for answer in answers if answer.error)),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(sum(a.completion_tokens for a in answers) / seconds, 2),
        "prompt_tokens": sum(answer.prompt_tokens for answer in whole) / max(1, len(whole)),
        "first": percentiles([first for answer in whole for first in answer.first]),
        "between": percentiles([gap for answer in whole for gap in answer.gaps]),
        "whole": percentiles([answer.seconds for answer in whole]),
        "client_cores": cores[0],
        "server_cores": cores[1],
        "server_memory": server.memory(),
        "texts": [answer.text if answer.is_complete else None for answer in answers],
    }
    if options.check:
        alone = await closed_loop(work(bodies, [None] * len(bodies)), 1)
        pairs = [(a, b) for a, b in zip(answers, alone, strict=True) if a.is_complete]
        figures["single"] = {
            "equal": sum(a.text == b.text for a, b in pairs),
            "of": len(pairs),
            "first": percentiles([first for answer in alone for first in answer.first]),
            "tokens_per_second": round(
                sum(a.completion_tokens for a in alone) / sum(a.seconds for a in alone), 2
            ),
        }
    return figures


async def interference(
    client: httpx.AsyncClient, server: Server, requests: Requests, options: argparse.Namespace
) -> dict[str, Any]:
    """Returns times to the first token of a short prompt, with and without a long one before it."""
    quiet, busy, gaps = [], [], []
    for repeat in range(options.repeats + 1):
        number = 10_000 + 10 * repeat
        short = [requests.body(number + i, 16, 4) for i in range(2)]
        long = requests.body(number + 2, options.long_tokens, 1)
        stream = requests.body(number + 3, 16, options.new_tokens)
        alone = await complete(client, short[0])
        running = asyncio.ensure_future(complete(client, stream))
        await asyncio.sleep(0.2)
        start = time.perf_counter()
        prefill = asyncio.ensure_future(complete(client, long))
        await asyncio.sleep(0.05)
        answer = await complete(client, short[1])
        long_answer, running_answer = await prefill, await running
        for each in (alone, answer, long_answer, running_answer):
            if each.error:
                raise RuntimeError(f"{server.name} answered: {each.error}")
        if repeat:  # the first one compiles
            quiet += alone.first
            busy += answer.first
            gaps += [
                after - before
                for before, after in itertools.pairwise(running_answer.events)
                if after >= start and before <= long_answer.end
            ]
    return {
        "long_tokens": long_answer.prompt_tokens,
        "long_seconds": round(long_answer.seconds, 3),
        "first_alone": percentiles(quiet),
        "first_during_prefill": percentiles(busy),
        "longest_gap": round(max(gaps, default=0.0), 3),
    }


async def idle(
    client: httpx.AsyncClient, server: Server, requests: Requests, options: argparse.Namespace
) -> dict[str, Any]:
    """Returns latencies and memory without and with idle connections."""

    async def measure() -> dict[str, Any]:
        answers = [await complete(client, requests.body(20_000 + i, 16, 16)) for i in range(20)]
        whole = percentiles([answer.seconds for answer in answers])
        errors = sum(answer.error is not None for answer in answers)
        return {"whole": whole, "memory": server.memory(), "errors": errors}

    await measure()
    before = await measure()
    host, port = httpx.URL(server.url).host, httpx.URL(server.url).port
    writers = []
    for _ in range(options.idle_connections):
        _, writer = await asyncio.open_connection(host, port)
        writers.append(writer)
    during = await measure()
    for writer in writers:
        writer.close()
    await asyncio.sleep(1)
    return {
        "connections": len(writers),
        "before": before,
        "during": during,
        "after": await measure(),
    }


async def soak(
    client: httpx.AsyncClient, server: Server, requests: Requests, options: argparse.Namespace
) -> dict[str, Any]:
    """Returns the figures of a mixed load with faults."""
    bodies = [requests.body(30_000 + i, 4 + 3 * i, 4 + i) for i in range(24)]
    endless = requests.body(40_000, 8, 200)
    clients, seconds, may_fail = options.clients, options.seconds, options.faults > 0
    return await Soak(client, server, bodies, endless, clients, seconds, may_fail).run()


async def measure(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of all scenarios, by name."""
    functions = {"load": load, "interference": interference, "idle": idle, "soak": soak}
    async with client_of(server, options) as client:
        response = await client.get("/v1/models")
        response.raise_for_status()
        model = options.served_name or response.json()["data"][0]["id"]
        requests = Requests(options, model, server.name if server.process else None)
        figures: dict[str, Any] = {}
        for name in options.scenarios:
            try:
                figures[name] = await functions[name](client, server, requests, options)
            except RuntimeError as error:
                figures[name] = {"error": str(error)}
        return figures


@contextlib.asynccontextmanager
async def client_of(
    server: Server, options: argparse.Namespace
) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    async with httpx.AsyncClient(
        base_url=server.url, headers=headers_of(options), timeout=options.limit, limits=limits
    ) as client:
        yield client


def print_load(lines: dict[str, dict[str, Any]]) -> None:
    """Prints the table of the load."""
    print(
        f"\n{'load':<16}{'tokens/s':>9}{'x':>7}{'first p50/p90/p99':>23}{'between ms 50/99':>18}"
        f"{'whole p50/p90/p99':>23}{'single':>9}{'first server':>14}{'cores':>12}"
    )
    reference = next(
        (line["load"] for line in lines.values() if "texts" in line.get("load", ())), None
    )
    for name, line in lines.items():
        if "texts" not in line.get("load", ()):
            continue
        own = line["load"]
        first, whole = (short(own[key], 50, 90, 99) for key in ("first", "whole"))
        between = short(own["between"], 50, 99, unit=1e-3, digits=0)
        single = f"{own['single']['equal']}/{own['single']['of']}" if "single" in own else "-"
        cores = " + ".join(
            "-" if own[key] is None else f"{own[key]:.1f}"
            for key in ("server_cores", "client_cores")
        )
        pairs = [
            a == b
            for a, b in zip(own["texts"], reference["texts"], strict=True)
            if a is not None and b is not None
        ]
        ratio = own["tokens_per_second"] / reference["tokens_per_second"]
        print(
            f"{name:<16}{own['tokens_per_second']:>9.1f}{ratio:>7.2f}{first:>23}{between:>18}"
            f"{whole:>23}{single:>9}{f'{sum(pairs)}/{len(pairs)}':>14}"
            f"{cores:>12}"
        )
        for error, count in own["errors"].items():
            print(f"{'':<16}{count} x {error}")


def print_others(lines: dict[str, dict[str, Any]]) -> None:
    """Prints the figures of all scenarios but the load."""
    for name, line in lines.items():
        if "error" in line:
            print(f"\n{name}: {line['error']}")
        for scenario in ("interference", "idle", "soak"):
            if scenario in line:
                print(f"\n{scenario}, {name}")
                for key, value in line[scenario].items():
                    if key != "memory":
                        print(f"    {key:<22}{value}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--url", help="address of a running server")
    add("--start", nargs="+", default=[], choices=SERVERS, help="servers to start")
    add("--model", help="preset name or folder")
    add("--gguf", help="GGUF file for llama.cpp. Default: --model")
    add("--backend", help="backend of Keras in the servers")
    add("--dtype", help="data type of the servers on Keras")
    add("--quantization", help="quantization of the servers on Keras")
    add("--slots", type=int, help="sequences at a time in a server. Default: --clients")
    add("--serve-options", default="", help="more options of keras-gemma serve, in one string")
    add("--api-key")
    add("--served-name", help="name of the model. Default: the first of /v1/models")
    add("--scenarios", nargs="+", default=["load"], choices=SCENARIOS)
    add("--arrivals", default="closed", choices=["closed", "poisson"])
    add("--clients", type=int, default=8)
    add("--rate", type=float, default=1.0, help="Poisson arrivals per second")
    add("--requests", type=int, default=64)
    add("--prompts", default="text", choices=["text", "ids"])
    add("--prompt-tokens", type=int, default=128)
    add("--new-tokens", type=int, default=64)
    add("--temperature", type=float, default=0.0)
    add("--seed", type=int, default=1)
    add("--cancel", type=float, default=0.0, help="share of requests that are canceled")
    add("--check", action="store_true", help="compare each text with that for one client")
    add("--long-tokens", type=int, default=2000, help="long prompt of the interference")
    add("--repeats", type=int, default=5, help="repeats of the interference")
    add("--idle-connections", type=int, default=1000)
    add("--seconds", type=float, default=60.0, help="time of the soak")
    add("--faults", type=float, default=0.0, help="share of the model's calls that fail in `ours`")
    add("--limit", type=float, default=600.0, help="time limit of a start or a request, in seconds")
    add("--json", type=Path, help="file for all figures")
    options = parser.parse_args(arguments)
    if bool(options.url) == bool(options.start):
        parser.error("pass either --url or --start")
    if options.start and not options.model:
        parser.error("--start needs --model")
    return options


def main() -> None:
    options = parse()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    lines: dict[str, dict[str, Any]] = {}
    if options.url:
        lines["server"] = asyncio.run(measure(Server("server", options.url), options))
    for name in options.start:
        try:
            with started(name, options) as server:
                lines[name] = asyncio.run(measure(server, options))
        except (RuntimeError, httpx.HTTPError) as error:
            lines[name] = {"error": str(error)}
        figures = {key: {**v, "texts": None} for key, v in lines[name].items() if key != "error"}
        print(json.dumps({"server": name, **figures}), flush=True)
    if options.json:
        options.json.write_text(json.dumps(lines, indent=1))
    print_load(lines)
    print_others(lines)


if __name__ == "__main__":
    main()
