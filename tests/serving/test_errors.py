"""Requests that fail: status, body, and that the engine serves the next one."""

import json
import math

import numpy as np
import pytest

from keras_gemma.generation.engine_request import EngineRequest, EngineStoppedError
from keras_gemma.serving.sse import event
from tests.serving import fake_engine

pytestmark = pytest.mark.once

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "Hi"}
HELLO = {"model": "tiny", "messages": [USER]}


def check_openai(response, status, code, param=None):
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"] and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == code and body["error"]["param"] == param
    assert body["error"]["message"]
    return body["error"]["message"]


def check_alive(client, engine):
    """The engine answers, and no slot is lost."""
    assert client.post(CHAT, json=HELLO).status_code == 200
    engine.wait_until(lambda engine: engine.stats().slots_used == 0)


def user(content):
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "Hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        (user([{"type": "image_url", "image_url": {"url": "x"}}]), "messages.0.content.0"),
        (user([{"type": "text"}]), "messages.0.content.0"),
        ({"messages": [{"role": "assistant", "content": "Hi"}, USER]}, "messages"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"seed": "abc"}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stop": 3}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop.1"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"stream_options": 1}, "stream_options"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "browser", "function": {"name": "f"}}]}, "tools.0.type"),
        ({"model": 3}, "model"),
    ],
)
def test_wrong_fields(client, engine, change, param):
    response = client.post(CHAT, json=HELLO | change)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert param.split(".")[-1] in error["message"] or param.split(".")[0] in error["message"]
    assert engine.requests == []
    check_alive(client, engine)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"top_logprobs": 2}, "`logprobs`"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "'f'"),
        ({"tool_choice": "required"}, "`tools`"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [10**30]}, "stop_token_ids"),
    ],
)
def test_fields_that_contradict(client, engine, change, words):
    response = client.post(CHAT, json=HELLO | change)
    assert response.status_code == 400 and words in response.json()["error"]["message"]
    check_alive(client, engine)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({}, "`prompt` is missing"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [10**9]}, "[0, 490]"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": [-1]}, "[0, 490]"),
        ({"prompt": "a", "max_tokens": 0}, "`echo`"),
        ({"prompt": "a", "best_of": 1, "n": 2}, "`best_of`"),
        ({"prompt": "a", "best_of": 2, "stream": True}, "`best_of`"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "suffix": "b"}, "`suffix`"),
        ({"prompt": ["a"] * 257}, "256 prompts"),
        ({"prompt": ["a"] * 3, "n": 128}, "sequences"),
        ({"prompt": "a", "n": 100, "max_tokens": 10**5}, "new tokens"),
    ],
)
def test_wrong_completions(client, engine, body, words):
    response = client.post(COMPLETIONS, json=body)
    assert response.status_code == 400, response.text
    assert words in response.json()["error"]["message"]
    assert engine.requests == []
    check_alive(client, engine)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"3",
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "a"}], "x": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"messages": ' + b"[" * 100_000,
        b'{"messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"messages": [{"role": "user", "content": "a"}], "x": ' + b"[" * 900 + b"]" * 900 + b"}}",
    ],
    ids=lambda body: body[:60].decode("latin-1"),
)
@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/generate"])
def test_bodies_that_are_not_valid(client, engine, path, body):
    response = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == (422 if path == "/generate" else 400), response.text
    assert response.json()["error"]
    check_alive(client, engine)


def test_half_of_a_surrogate_pair(client, engine):
    """JSON can have it, and UTF-8 cannot."""
    half = "\ud800"

    def post(path, **fields):
        body = json.dumps({"model": "tiny", **fields})
        return client.post(path, content=body, headers={"Content-Type": "application/json"})

    ok = [{"role": "user", "content": "a"}]
    assert post(CHAT, messages=ok, model=half).status_code == 404
    assert post(CHAT, messages=ok, user=half).status_code == 200
    answer = post("/v1/responses", input="a", metadata={"a": half})
    assert answer.status_code == 200 and answer.json()["metadata"] == {"a": half}
    for path, fields in [
        (COMPLETIONS, {"prompt": half, "echo": True}),
        ("/v1/responses", {"input": half}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": half}]}),
        ("/tokenize", {"prompt": half}),
    ]:
        assert post(path, **fields).status_code == 400, path
    check_alive(client, engine)


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
@pytest.mark.parametrize("stream", ["true", "false"])
def test_numbers_that_are_not_json_in_free_fields(client, engine, number, stream):
    body = f'{{"input": "a", "stream": {stream}, "metadata": {{"a": {number}}}}}'
    headers = {"Content-Type": "application/json"}
    response = client.post("/v1/responses", content=body, headers=headers)
    assert number in check_openai(response, 400, "invalid_json")
    assert engine.requests == []


def test_events_are_json():
    with pytest.raises(ValueError, match="not JSON compliant"):
        event({"a": math.nan})


def test_huge_but_legal_numbers(client, engine):
    answer = client.post(CHAT, json=HELLO | {"seed": 10**100, "user": 10**400, "max_tokens": 2})
    assert answer.status_code == 200 and answer.json()["seed"] == 10**100 % 2**32
    response = client.post(CHAT, json=HELLO | {"max_tokens": 10**30})
    assert response.status_code == 400
    response = client.post(CHAT, json=HELLO | {"top_k": 10**30})
    assert response.status_code == 400


def test_a_form_is_not_json(client):
    response = client.post(CHAT, content=json.dumps(HELLO), headers={"Content-Type": "text/plain"})
    message = check_openai(response, 400, "invalid_body")
    assert "Content-Type" in message


def test_context_length(client, engine):
    response = client.post(CHAT, json=HELLO | {"max_tokens": 600})
    check_openai(response, 400, "context_length_exceeded")
    response = client.post(COMPLETIONS, json={"prompt": [5] * 600, "max_tokens": 1})
    check_openai(response, 400, "context_length_exceeded", "prompt")
    response = client.post(CHAT, json=user("word " * 600) | {"stream": True})
    check_openai(response, 400, "context_length_exceeded")
    response = client.post("/v1/messages", json=HELLO | {"max_tokens": 600})
    assert response.status_code == 400
    assert response.json()["type"] == "error"
    assert response.json()["error"]["type"] == "invalid_request_error"
    response = client.post("/generate", json={"inputs": "a", "parameters": {"max_new_tokens": 600}})
    assert response.status_code == 422 and response.json()["error_type"] == "validation"
    check_alive(client, engine)


def test_unknown_names(client, engine):
    response = client.post(CHAT, json=HELLO | {"model": "gpt"})
    assert "tiny" in check_openai(response, 404, "model_not_found", "model")
    check_openai(client.get("/v1/models/gpt"), 404, "model_not_found", "model")
    check_openai(client.get("/nothing"), 404, "not_found")
    response = client.post("/v1/messages", json=HELLO | {"model": "claude", "max_tokens": 1})
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "not_found_error"
    response = client.get(CHAT)
    check_openai(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    check_alive(client, engine)


KEYED = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("POST", CHAT),
    ("POST", COMPLETIONS),
    ("POST", "/v1/responses"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/generate"),
    ("POST", "/generate_stream"),
    ("POST", "/"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/tokenizer_info"),
    ("GET", "/info"),
    ("GET", "/version"),
    ("GET", "/metrics"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/nothing"),
]
OPEN = {"/health", "/ready", "/live", "/", "/page/{name}"}


def routes_of(routes):
    """Yields method and path of all routes, also of those in routers."""
    for route in routes:
        if inner := getattr(getattr(route, "original_router", route), "routes", None):
            yield from routes_of(inner)
        else:
            yield from ((method, route.path) for method in route.methods)


def test_every_route_needs_a_key(client_of):
    client = client_of(api_keys=("secret", "other"))
    for method, path in KEYED:
        for headers in ({}, {"Authorization": "Bearer Secret"}, {"x-api-key": "secre"}):
            response = client.request(method, path, headers=headers)
            assert response.status_code == 401, (path, response.text)
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]
    listed = {path for _, path in KEYED} | OPEN
    for _, path in routes_of(client.app.routes):
        is_listed = path.replace("{model:path}", "tiny") in listed
        assert is_listed or path in ("/docs/oauth2-redirect", "/redoc"), path
    for path in ("/health", "/ready", "/live"):
        assert client.get(path).status_code == 200
    for headers in ({"Authorization": "Bearer secret"}, {"x-api-key": "other"}):
        assert client.get("/v1/models", headers=headers).status_code == 200
    response = client.post("/v1/messages", json={})
    assert response.json()["error"]["type"] == "authentication_error"
    response = client.get("/v1/models", headers={"Authorization": b"Bearer \xff"})
    assert response.status_code == 401


def test_metrics_without_a_key(client_of):
    client = client_of(api_keys=("secret",), metrics_without_key=True)
    assert client.get("/metrics").status_code == 200
    assert client.get("/version").status_code == 401


def test_keys_do_not_share_cached_prefixes(client_of, engine):
    client = client_of(api_keys=("a", "b"))
    for key in ("a", "b", "a"):
        headers = {"Authorization": f"Bearer {key}"}
        assert client.post(CHAT, json=HELLO, headers=headers).status_code == 200
    first, second, third = (request.cache_salt for request in engine.requests)
    assert first == third != second and len(first) == 32


def test_large_bodies(client_of, engine):
    client = client_of(max_body_bytes=1000)
    body = json.dumps(HELLO | {"user": "x" * 1000})
    headers = {"Content-Type": "application/json"}
    check_openai(client.post(CHAT, content=body, headers=headers), 413, "body_too_large")

    def pieces():
        for _ in range(10):
            yield b" " * 200

    response = client.post(CHAT, content=pieces(), headers=headers)  # without a length
    assert response.status_code == 413 and response.json()["error"]["message"]
    response = client.post("/v1/messages", content=body, headers=headers)
    assert response.json()["error"]["type"] == "request_too_large"
    check_alive(client, engine)


def fill(engine):
    """Fills slots and queue, without turns."""
    engine.hold()
    handles = []
    for _ in range(engine.max_queued_requests):
        handles.append(engine.add_request(EngineRequest(np.array([5], "int32"), 3)))
    return handles


def test_a_full_queue(client, engine):
    fill(engine)
    response = client.post(CHAT, json=HELLO)
    check_openai(response, 429, "queue_full")
    assert response.headers["retry-after"] == "2"
    assert response.json()["error"]["type"] == "rate_limit_error"
    streamed = client.post(CHAT, json=HELLO | {"stream": True})
    check_openai(streamed, 429, "queue_full")  # a status, not an event
    response = client.post("/v1/messages", json=HELLO | {"max_tokens": 3})
    assert response.status_code == 429
    assert response.json()["error"]["type"] == "rate_limit_error"
    response = client.post("/generate", json={"inputs": "a"})
    assert response.status_code == 429 and response.json()["error_type"] == "overloaded"
    engine.release()
    check_alive(client, engine)
    text = client.get("/metrics").text
    assert 'keras_gemma_requests_rejected_total{model_name="tiny",reason="queue_full"} 4.0' in text


def test_prompts_are_queued_all_or_none(client, engine):
    engine.hold()
    handle = engine.add_request(EngineRequest(np.array([5], "int32"), 3))
    response = client.post(COMPLETIONS, json={"prompt": ["a"] * 4})
    check_openai(response, 429, "queue_full")
    assert list(engine.waiting) == [handle]
    engine.release()
    check_alive(client, engine)


def test_more_prompts_than_the_queue_ever_takes(client, engine):
    response = client.post(COMPLETIONS, json={"prompt": ["a"] * 5})
    assert "At most 4 prompts" in check_openai(response, 400, "too_many_choices", "prompt")
    assert engine.requests == []
    check_alive(client, engine)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [(RuntimeError("secret details"), 500, "server_error"), (EngineStoppedError("bye"), 503, None)],
)
def test_an_exception_before_the_first_token(client, engine, stream, error, status, kind):
    engine.failure = error
    response = client.post(CHAT, json=HELLO | {"stream": stream})
    assert response.status_code == status and "secret" not in response.text
    if kind:
        assert response.json()["error"]["type"] == kind
    engine.failure = error
    response = client.post("/generate", json={"inputs": "a"})
    assert response.status_code == (424 if status == 500 else 503)
    check_alive(client, engine)


def fail_in_step(engine, number):
    """Makes the engine fail in a step after the first tokens."""
    step, count = engine.step, 0

    def failing():
        nonlocal count
        count += 1
        if count == number:
            engine.failure = RuntimeError("secret details")
        step()

    engine.step = failing


def test_an_exception_in_a_stream_is_an_event(client, engine):
    fail_in_step(engine, 3)
    response = client.post(CHAT, json=HELLO | {"stream": True})
    assert response.status_code == 200
    *blocks, last = response.text.removesuffix("\n\n").split("\n\n")
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["type"] == "server_error" and "secret" not in error["message"]
    assert all('"finish_reason":null' in block for block in blocks)
    check_alive(client, engine)


def test_error_events_of_other_apis(client, engine):
    fail_in_step(engine, 3)
    response = client.post("/v1/messages", json=HELLO | {"stream": True, "max_tokens": 9})
    name, data = response.text.removesuffix("\n\n").split("\n\n")[-1].split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["type"] == "api_error"
    fail_in_step(engine, 3)
    response = client.post("/v1/responses", json={"input": "Hi", "stream": True})
    *_, failed, last = response.text.removesuffix("\n\n").split("\n\n")
    assert failed.startswith("event: response.failed") and last.startswith("event: error")
    fail_in_step(engine, 3)
    response = client.post("/generate_stream", json={"inputs": "Hi"})
    last = response.text.removesuffix("\n\n").split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error_type"] == "generation"
    check_alive(client, engine)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"input": "a", "previous_response_id": "r"}, "`previous_response_id`"),
        ({"input": [{"type": "file"}]}, "'file'"),
        ({"input": [{"content": "a"}]}, "`role`"),
        ({"input": [{"type": "function_call"}]}, "`call_id`"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "'web_search'"),
        ({"input": 3}, "input"),
        ({"input": []}, "at least one message"),
        ({}, "`input` is missing"),
    ],
)
def test_wrong_responses(client, engine, body, words):
    response = client.post("/v1/responses", json=body)
    assert response.status_code == 400 and words in response.json()["error"]["message"]
    check_alive(client, engine)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "`tool_use_id`"),
        ({"tool_choice": {"type": "tool"}}, "`name`"),
        ({"tools": [{"type": "bash_1", "name": "b"}]}, "'bash_1'"),
        ({"temperature": 1.5}, "temperature"),
    ],
)
def test_wrong_messages(client, engine, change, words):
    response = client.post("/v1/messages", json=HELLO | {"max_tokens": 5} | change)
    assert response.status_code == 400
    body = response.json()
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert words in body["error"]["message"]
    check_alive(client, engine)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"temperature": 0}, "temperature"),
        ({"best_of": 2}, "`do_sample`"),
        ({"best_of": 99, "do_sample": True}, "best_of"),
        ({"watermark": True}, "`watermark`"),
        ({"typical_p": 0.5}, "`typical_p`"),
        ({"adapter_id": "a"}, "`adapter_id`"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"grammar": {"type": "json", "value": 3}}, "an object"),
        ({"stop": "a"}, "stop"),
    ],
)
def test_wrong_parameters_of_tgi(client, engine, parameters, words):
    for path in ("/generate", "/generate_stream", "/"):
        response = client.post(path, json={"inputs": "a", "parameters": parameters})
        assert response.status_code == 422, response.text
        assert words in response.json()["error"]
        assert response.json()["error_type"] == "validation"
    check_alive(client, engine)


def test_wrong_tokens(client):
    for path, body in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "content": "b"}),
        ("/tokenize", {"messages": []}),
        ("/detokenize", {"tokens": [10**9]}),
        ("/detokenize", {"tokens": "a"}),
        ("/detokenize", {}),
    ):
        response = client.post(path, json=body)
        assert response.status_code == 400 and response.json()["error"]["message"], (path, body)


def test_infinite_logprobs_are_numbers(client, engine, monkeypatch):
    output = fake_engine.EngineOutput
    monkeypatch.setattr(
        fake_engine,
        "EngineOutput",
        lambda *args, logprobs=None, **rest: output(
            *args, logprobs=None if logprobs is None else np.array([-math.inf]), **rest
        ),
    )
    answer = client.post(CHAT, json=HELLO | {"logprobs": True}).json()
    assert answer["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0


def test_an_engine_that_does_not_score_prompts(client, engine):
    client.app.state.service.texts._score_prompt = None
    body = {"prompt": "a", "echo": True, "logprobs": 1}
    response = client.post(COMPLETIONS, json=body)
    assert response.status_code == 400 and "prompts" in response.json()["error"]["message"]
    parameters = {"decoder_input_details": True}
    response = client.post("/generate", json={"inputs": "a", "parameters": parameters})
    assert response.status_code == 422
    check_alive(client, engine)


def test_an_engine_that_fails_while_it_scores_a_prompt(client, engine):
    def fail(ids, count):
        raise RuntimeError("secret details")
        yield

    client.app.state.service.texts._score_prompt = fail
    response = client.post(COMPLETIONS, json={"prompt": "a", "echo": True, "logprobs": 1})
    assert response.status_code == 500 and "secret" not in response.text
    check_alive(client, engine)
