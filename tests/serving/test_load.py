"""The load generator of examples/benchmarks, with answers that are made here."""

import asyncio
import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

httpx = pytest.importorskip("httpx")

pytestmark = pytest.mark.once

FOLDER = Path(__file__).parents[2] / "examples/benchmarks"
URL = "http://127.0.0.1:9"


@pytest.fixture
def load(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("serve")


def stream(*texts: str, is_complete: bool = True, usage: dict | None = None) -> bytes:
    """Returns the body of a streamed answer. The JSON has every character as it is."""
    events = [{"choices": [{"index": 0, "text": text, "finish_reason": None}]} for text in texts]
    events += [{"choices": [], "usage": usage}] if usage else []
    lines = [json.dumps(event, ensure_ascii=False) for event in events]
    lines += ["[DONE]"] if is_complete else []
    return "".join(f"data: {line}\n\n" for line in lines).encode()


def client(handler) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=URL, transport=httpx.MockTransport(handler))


def complete(load, content: bytes, status: int = 200, max_events: int | None = None):
    async def run():
        async with client(lambda _: httpx.Response(status, content=content)) as http:
            return await load.complete(http, {"prompt": "x"}, max_events)

    return asyncio.run(run())


def test_answers(load):
    usage = {"prompt_tokens": 3, "completion_tokens": 5}
    answer = complete(load, stream("a\u2028", "b\x85", usage=usage))
    assert (answer.text, answer.error, answer.is_complete) == ("a\u2028b\x85", None, True)
    assert (answer.prompt_tokens, answer.completion_tokens) == (3, 5)
    assert len(answer.events) == 2 and len(answer.gaps) == len(answer.first) == 1
    assert complete(load, stream("a", "b")).completion_tokens == 2


def test_answers_without_an_end(load):
    assert complete(load, stream("a", is_complete=False)).error == "the stream had no end"
    failed = b'data: {"error": {"message": "the model failed"}}\n\n'
    answer = complete(load, stream("a", is_complete=False) + failed)
    assert (answer.text, answer.error) == ("a", "the model failed")
    assert complete(load, b'{"error": {"message": "full"}}', 429).error == "full"
    assert complete(load, b"Bad gateway", 502).error == "Bad gateway"
    answer = complete(load, stream("a", "b", "c"), max_events=2)
    assert answer.was_cancelled and answer.text == "ab" and answer.error is None


def test_percentiles(load):
    assert load.percentiles([3.0, 1.0, 2.0]) == {"p50": 2.0, "p90": 3.0, "p99": 3.0}
    assert load.short(load.percentiles([0.002]), 50, 99, unit=1e-3, digits=0) == "2/2"
    assert load.short(load.percentiles([]), 50) == "-"


@pytest.mark.parametrize("prompts", ["text", "ids"])
def test_prompts_have_their_length(load, prompts):
    from keras_gemma import GemmaTokenizer

    tokenizer = GemmaTokenizer.from_preset("gemma_tiny_en")
    options = ["--start", "ours", "--model", "gemma_tiny_en", "--prompts", prompts]
    requests = load.Requests(load.parse(options), "model", "ours")
    for size in (16, 100):
        prompt = requests.body(1, size)["prompt"]
        ids = prompt if prompts == "ids" else [2, *tokenizer.encode([prompt])[0]]
        assert size - 8 < len(ids) <= size
    assert requests.body(1) == requests.body(1)
    assert requests.body(1)["prompt"][:12] != requests.body(2)["prompt"][:12]


def answer_of(request) -> bytes:
    """Returns an answer that depends only on the request."""
    body = json.loads(request.content)
    return stream(*(f"{body['seed']}.{i} " for i in range(body["max_tokens"])))


def test_load_finds_texts_that_differ(load, capsys):
    seen: dict[int, int] = {}

    def handler(request):
        seed = json.loads(request.content)["seed"]
        seen[seed] = seen.get(seed, 0) + 1
        is_wrong = seed == 2 and seen[seed] == 2
        return httpx.Response(200, content=stream("wrong") if is_wrong else answer_of(request))

    arguments = ["--url", URL, "--requests", "6", "--clients", "3", "--check"]
    options = load.parse([*arguments, "--arrivals", "poisson", "--rate", "1000"])

    async def run():
        async with client(handler) as http:
            server = load.Server("server", URL)
            return await load.load(http, server, load.Requests(options, "model", None), options)

    figures = asyncio.run(run())
    assert (figures["single"]["equal"], figures["single"]["of"]) == (5, 6)
    assert figures["errors"] == {} and figures["tokens_per_second"] > 0
    load.print_load({"server": {"load": figures}})
    assert "5/6" in capsys.readouterr().out


@pytest.mark.parametrize("fault", [None, "text", "status", "end"])
def test_soak_finds_faults(load, fault, monkeypatch):
    soak = importlib.import_module("serve_soak")
    monkeypatch.setattr(soak, "SETTLE_SECONDS", 0)
    monkeypatch.setattr(soak, "OVERSIZED_BYTES", 1_100_000)
    equally_often = {kind: (1, status) for kind, (_, status) in soak.KINDS.items()}
    monkeypatch.setattr(soak, "KINDS", equally_often)
    calls = 0

    def handler(request):
        nonlocal calls
        calls += 1
        if request.url.path == "/metrics":
            return httpx.Response(200, text='keras_gemma_slots_used{model_name="m"} 0.0\n')
        if len(request.content) > 1_000_000:
            return httpx.Response(413)
        try:
            body = json.loads(request.content)
        except ValueError:
            return httpx.Response(500 if fault == "status" else 400)
        if body["model"] == "unknown" or body["temperature"] < 0:
            return httpx.Response(404 if body["model"] == "unknown" else 400)
        if fault == "text" and calls > 30:
            return httpx.Response(200, content=stream("wrong"))
        content = answer_of(request)
        return httpx.Response(
            200, content=content[:-20] if fault == "end" and calls > 30 else content
        )

    options = load.parse(["--url", URL])
    requests = load.Requests(options, "model", None)
    bodies = [requests.body(i, 4, 6) for i in range(8)]

    async def run():
        async with client(handler) as http:
            server = load.Server("server", URL)
            return await soak.Soak(http, server, bodies, bodies[0], 2, 0.4).run()

    figures = asyncio.run(run())
    assert figures["left"] == {"slots_used": 0.0}
    assert set(soak.KINDS) <= set(figures["counts"])
    found = " ".join(figures["unexpected"])
    expected = {"text": "answer: another text", "status": "not JSON: status 500", "end": "no end"}
    assert (expected[fault] in found) if fault else found == ""


def test_memory_growth(load):
    growth = importlib.import_module("serve_soak").growth
    assert growth([1.0] * 2 + [2.0] * 16 + [3.0] * 2) == 0.5
    assert growth([1.0]) is None
