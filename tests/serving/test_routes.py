"""TGI's routes, tokens, probes, the page, and what middleware adds, on a fake engine."""

import json
import logging
from types import SimpleNamespace

import httpx2
import pytest

from tests.serving.live import live_server
from tests.serving.sse import events

pytestmark = pytest.mark.once

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}
TEXT = "Hello there, world!"


def generate(client, inputs, path="/generate", **parameters):
    response = client.post(path, json={"inputs": inputs, "parameters": parameters})
    assert response.status_code == 200, response.text
    return response.json()


def test_generate(client, engine):
    assert generate(client, "To be") == {"generated_text": TEXT}
    request = engine.requests[0]
    assert request.prompt.tolist() == [2, *engine.tokenizer.encode(["To be"])[0]]
    assert (request.max_new_tokens, request.temperature) == (100, 0)
    assert generate(client, "To be", "/") == [{"generated_text": TEXT}]
    assert generate(client, "A", return_full_text=True)["generated_text"] == "A" + TEXT
    generate(client, "To be", truncate=2, do_sample=True, seed=3, top_k=4, max_new_tokens=2)
    request = engine.requests[-1]
    assert request.prompt.tolist() == engine.tokenizer.encode(["<bos>be"])[0][::2]  # 2, b, e
    assert (request.temperature, request.seed, request.top_k) == (1.0, 3, 4)


def test_details(client, engine):
    details = generate(
        client,
        "To",
        details=True,
        decoder_input_details=True,
        top_n_tokens=2,
        do_sample=True,
        seed=3,
        best_of=2,
        stop=["there"],
    )["details"]
    assert (details["finish_reason"], details["seed"]) == ("stop_sequence", 3)
    assert "".join(token["text"] for token in details["tokens"]) == "Hello "
    assert details["generated_tokens"] == len(details["tokens"])
    assert [token["logprob"] for token in details["prefill"]] == [None, -1.0, -2.0]
    assert [len(tops) for tops in details["top_tokens"]] == [2] * len(details["tokens"])
    (other,) = details["best_of_sequences"]
    assert other["tokens"][0]["logprob"] == -1.5  # that of the fake's second copy
    greedy = generate(client, "To", details=True)["details"]
    assert (greedy["finish_reason"], greedy["seed"]) == ("eos_token", None)
    last = greedy["tokens"][-1]
    assert last["special"] and last["text"] == "<end_of_turn>"


def test_generate_stream(client):
    for path, extra in (("/generate_stream", {}), ("/", {"stream": True})):
        response = client.post(path, json={"inputs": "A", **extra})
        items = [data for name, data in events(response)]
        assert [item["index"] for item in items] == list(range(1, len(items) + 1))
        texts = [item["token"]["text"] for item in items if not item["token"]["special"]]
        assert "".join(texts) == TEXT
        assert [item["generated_text"] for item in items] == [None] * (len(items) - 1) + [TEXT]
        assert items[-1]["details"]["finish_reason"] == "eos_token"


def test_info(client):
    info = client.get("/info").json()
    assert (info["model_id"], info["max_total_tokens"], info["max_concurrent_requests"]) == (
        "tiny",
        512,
        2,
    )


def test_tokenize(client, engine):
    def post(**body):
        response = client.post("/tokenize", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    text = "To bé"
    ids = engine.tokenizer.encode([text])[0]
    entries = post(inputs=text)
    assert [entry["id"] for entry in entries] == [2, *ids]
    assert text[entries[1]["start"] : entries[1]["stop"]] == entries[1]["text"]
    assert entries[-1]["stop"] == len(text)
    answer = post(prompt=text, return_token_strs=True)
    assert answer["tokens"] == [2, *ids] and answer["count"] == len(ids) + 1
    assert answer["max_model_len"] == 512 and answer["token_strs"][0] == "<bos>"
    assert post(prompt="<eos>", add_special_tokens=False)["tokens"] == [1]  # as lm-eval asks
    assert post(content=text)["tokens"] == ids
    assert post(content="<eos>", parse_special=False)["tokens"] != [1]
    assert post(content="", add_special=True)["tokens"] == [2]
    chat = post(**HELLO)["tokens"]
    assert chat == engine.tokenizer.apply_chat_template(HELLO["messages"])
    back = client.post("/detokenize", json={"tokens": ids}).json()
    assert back == {"prompt": text, "content": text}
    assert client.post("/detokenize", json={"tokens": []}).json()["prompt"] == ""


def test_tokenizer_info(client, engine):
    info = client.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == ("<bos>", "<eos>")
    assert info["vocab_size"] == engine.tokenizer.vocabulary_size()
    assert "start_of_turn" in info["chat_template"]


def test_probes(client):
    assert client.get("/health").json() == {
        "status": "ok",
        "slots_used": 0,
        "slots_total": 2,
        "waiting": 0,
    }
    assert client.get("/ready").status_code == client.get("/live").status_code == 200
    assert client.get("/version").json()["version"]


def test_documentation(client):
    assert client.get("/docs").status_code == 200
    paths = client.get("/openapi.json").json()["paths"]
    assert {CHAT, "/v1/responses", "/v1/messages", "/generate"} <= paths.keys()
    assert "/" in paths and list(paths["/"]) == ["post"]


def test_page(client_of, tmp_path):
    client = client_of()
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy and "http" not in policy
    script = client.get("/page/app.js")
    assert script.headers["content-type"].startswith("text/javascript")
    assert script.headers["x-content-type-options"] == "nosniff"
    (tmp_path / "page").mkdir()
    (tmp_path / "secret.js").write_text("secret")
    (tmp_path / "page/key.pem").write_text("secret")
    client = client_of(page_folder=tmp_path / "page")
    for path in ("/", "/page/app.js", "/page/key.pem", "/page/..%2fsecret.js", "/page/%2e%2e"):
        assert client.get(path).status_code == 404


def test_the_page_is_open(client_of):
    client = client_of(api_keys=("secret",))
    assert client.get("/").status_code == client.get("/page/app.js").status_code == 200
    assert client.get("/page/../v1/models").status_code == 401


def test_cross_origin_requests(client_of):
    origin = {"Origin": "https://a.example"}
    preflight = {**origin, "Access-Control-Request-Method": "POST"}
    client = client_of()
    assert "access-control-allow-origin" not in client.get("/version", headers=origin).headers
    assert client.options(CHAT, headers=preflight).status_code == 405
    client = client_of(cors_origins=("https://a.example",), api_keys=("k",))
    allowed = client.options(CHAT, headers=preflight)
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    response = client.get("/version", headers=origin)
    assert response.status_code == 401  # with the header, so that the page can read it
    assert response.headers["access-control-allow-origin"] == "https://a.example"
    other = client.get("/version", headers={"Origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers


def test_a_path_prefix(engine, preprocessor):
    """The proxy has removed the prefix, and uvicorn adds it again."""
    headers = {"x-api-key": "k"}
    options = {"root_path": "/gemma"}
    with live_server(engine, preprocessor, options=options, api_keys=("k",)) as live:
        assert httpx2.get(f"{live.url}/health").status_code == 200
        assert httpx2.get(f"{live.url}/v1/models").status_code == 401
        assert httpx2.get(f"{live.url}/v1/models", headers=headers).status_code == 200
        response = httpx2.post(f"{live.url}/v1/messages", json={}, headers=headers)
        assert response.json()["type"] == "error"


def lines(caplog):
    return [
        json.loads(record.message)
        for record in caplog.records
        if record.name == "keras_gemma.serving.requests"
    ]


def test_log_lines(client, engine, caplog):
    caplog.set_level(logging.INFO, "keras_gemma.serving.requests")
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"X-Request-Id": "my-id", "traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    response = client.post(CHAT, json=HELLO, headers=headers)
    assert response.headers["x-request-id"] == response.headers["request-id"] == "my-id"
    client.post(CHAT, json=HELLO | {"stream": True, "max_tokens": 2})
    client.post(CHAT, json=HELLO | {"temperature": 9})
    client.get("/health")
    first, second, third = lines(caplog)
    assert (first["request_id"], first["trace_id"], first["route"]) == ("my-id", trace, CHAT)
    assert (first["status"], first["model"], first["finish_reasons"]) == (200, "tiny", ["stop"])
    assert first["prompt_tokens"] == len(engine.requests[0].prompt)
    assert {"queue_seconds", "prefill_seconds", "decode_seconds", "seconds"} <= first.keys()
    assert second["is_stream"] and second["completion_tokens"] == 2
    assert second["finish_reasons"] == ["length"] and not second["is_client_gone"]
    assert (third["status"], third["error"]) == (400, "invalid_value")
    assert "Hi" not in caplog.text and TEXT not in caplog.text


def test_request_ids_of_clients_are_checked(client, caplog):
    caplog.set_level(logging.INFO, "keras_gemma.serving.requests")
    for wrong in ("a b", "x" * 200, 'a"b', ""):
        response = client.get("/version", headers={"X-Request-Id": wrong, "traceparent": wrong})
        assert len(response.headers["x-request-id"]) == 32
    assert all("trace_id" not in line for line in lines(caplog))


def test_prompts_are_logged_only_if_asked(client_of, caplog):
    caplog.set_level(logging.INFO, "keras_gemma.serving.requests")
    client_of(log_prompts=True).post(CHAT, json=HELLO)
    (line,) = lines(caplog)
    assert line["prompt"] == ["user: Hi"]


def test_a_500_has_a_request_id_and_a_log_line(client, engine, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "keras_gemma.serving.requests")
    monkeypatch.setattr(engine, "stats", lambda: 1 / 0)
    response = client.get("/health")
    assert response.status_code == 500 and response.headers["x-request-id"]
    assert response.json()["error"]["type"] == "server_error"


def test_metrics(client, engine):
    for _ in range(2):
        client.post(CHAT, json=HELLO | {"n": 2, "max_tokens": 5})
    client.post(CHAT, json=HELLO | {"model": "user text"})
    client.get("/secret/user/text")
    text = client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    label = 'model_name="tiny"'
    for name, value in {
        f'request_success_total{{finished_reason="length",{label}}}': 4,
        f"time_to_first_token_seconds_count{{{label}}}": 2,
        f"e2e_request_latency_seconds_count{{{label}}}": 2,
        f"inter_token_latency_seconds_count{{{label}}}": 16,
        f"request_generation_tokens_sum{{{label}}}": 20,
        f"request_params_n_sum{{{label}}}": 4,
        f"request_params_max_tokens_sum{{{label}}}": 10,
        f"slots_total{{{label}}}": 2,
        f"num_requests_running{{{label}}}": 0,
        f"prefix_cache_hits_total{{{label}}}": 5,
        f"engine_restarts_total{{{label}}}": 0,
        f"decode_steps_total{{{label}}}": 3,
        f"turn_seconds_total{{{label}}}": 0.5,
        f'http_requests_total{{{label},route="{CHAT}",status="404"}}': 1,
        f'http_requests_total{{{label},route="unknown",status="404"}}': 1,
    }.items():
        assert float(values[f"keras_gemma_{name}"]) == value, name
    assert "user" not in text and "Hi" not in text


def test_the_time_per_token_is_that_of_one_sequence(client, engine, monkeypatch):
    """The fake makes a token of each sequence in a turn, however many there are."""
    seen = []
    metrics = client.app.state.service.metrics
    monkeypatch.setattr(metrics, "per_token", SimpleNamespace(observe=seen.append))
    decode = []
    monkeypatch.setattr(metrics, "decode", SimpleNamespace(observe=decode.append))
    body = {"prompt": ["a", "b"], "n": 3, "max_tokens": 5}
    assert client.post("/v1/completions", json=body).status_code == 200
    assert len(seen) == 2
    assert seen == pytest.approx([seconds / 4 for seconds in decode])


def test_two_applications_have_metrics_of_their_own(client_of):
    first, second = client_of(), client_of()
    first.get("/version")
    assert "/version" not in second.get("/metrics").text
