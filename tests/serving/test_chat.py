"""`/v1/chat/completions` on a fake engine."""

import pytest

from tests.serving.sse import chunks

pytestmark = pytest.mark.once

PATH = "/v1/chat/completions"
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
TEXT = "Hello there, world!"


def ask(client, **fields):
    response = client.post(PATH, json={**HELLO, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def sent(client, engine, messages):
    """Returns the prompt that the engine received."""
    ask(client, messages=messages)
    return engine.tokenizer.detokenize(engine.requests[-1].prompt, skip_special_tokens=False)


def test_whole_answer(client, engine):
    answer = ask(client, seed=7)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": TEXT, "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    assert answer["object"] == "chat.completion" and answer["model"] == "tiny"
    assert answer["id"].startswith("chatcmpl-") and answer["seed"] == 7
    prompt = engine.tokenizer.apply_chat_template(HELLO["messages"])
    assert engine.requests[0].prompt.tolist() == prompt
    new = len(engine.tokenizer.encode([TEXT])[0]) + 1  # and the stop token
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": new,
        "total_tokens": len(prompt) + new,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert engine.requests[0].max_new_tokens == engine.max_length - len(prompt)


def test_framing_of_streams(client):
    options = {"include_usage": True}
    response = client.post(PATH, json={**HELLO, "stream": True, "stream_options": options})
    items = chunks(response)
    assert len({(item["id"], item["created"]) for item in items}) == 1
    assert {item["object"] for item in items} == {"chat.completion.chunk"}
    *parts, last = items
    assert last["choices"] == [] and last["usage"] == ask(client)["usage"]
    assert all(item["usage"] is None for item in parts)
    choices = [item["choices"][0] for item in parts]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(parts) - 1) + ["stop"]
    assert choices[-1]["delta"] == {}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == TEXT


def test_streams_have_no_usage_unless_asked(client):
    assert all(
        "usage" not in item for item in chunks(client.post(PATH, json=HELLO | {"stream": 1}))
    )


def test_several_choices(client, engine):
    answer = ask(client, n=2, max_tokens=3)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert engine.requests[0].num_return_sequences == 2
    items = chunks(client.post(PATH, json=HELLO | {"stream": True, "n": 2}))
    for index in (0, 1):
        mine = [item["choices"][0] for item in items if item["choices"][0]["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == TEXT
        assert mine[0]["delta"]["role"] == "assistant" and mine[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("stop", ["there", ["world", " there"], None])
def test_stop_strings(client, engine, stop):
    (choice,) = ask(client, stop=stop)["choices"]
    expected = {"there": "Hello ", None: TEXT}.get(stop if stop is None else str(stop), "Hello")
    assert choice["message"]["content"] == expected and choice["finish_reason"] == "stop"
    assert bool(engine.finished) == (stop is not None)
    items = chunks(client.post(PATH, json=HELLO | {"stream": True, "stop": stop}))
    contents = [item["choices"][0]["delta"].get("content", "") for item in items]
    assert "".join(contents) == expected


def test_a_stop_string_of_one_choice_frees_its_slot(client, engine):
    engine.script = lambda request, index: engine.tokenizer.encode([("ab", "xb")[index] + "c" * 9])[
        0
    ]
    contents = [
        choice["message"]["content"]
        for choice in ask(client, n=2, stop=["xb"], max_tokens=9)["choices"]
    ]
    assert contents[1] == "" and contents[0].startswith("abc")
    assert [index for _, index in engine.finished] == [1]


def test_logprobs(client):
    (choice,) = ask(client, logprobs=True, top_logprobs=2)["choices"]
    content = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == TEXT  # without the stop token
    for entry in content:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert entry["logprob"] == -0.5 and len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["token"] == entry["token"]
    items = chunks(client.post(PATH, json=HELLO | {"stream": True, "logprobs": True}))
    streamed = [item["choices"][0]["logprobs"] for item in items]
    entries = [entry for part in streamed if part for entry in part["content"]]
    assert entries == [entry | {"top_logprobs": []} for entry in content]


def test_bytes_of_split_characters(client, engine):
    engine.text = "é☕"  # characters that the vocabulary has as bytes
    (choice,) = ask(client, logprobs=True)["choices"]
    assert choice["message"]["content"] == "é☕"
    content = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == "é☕"
    assert content[-1]["token"] == "bytes:\\x95"
    items = chunks(client.post(PATH, json=HELLO | {"stream": True}))
    assert [
        item["choices"][0]["delta"]["content"]
        for item in items
        if item["choices"][0]["delta"].get("content")
    ] == ["é", "☕"]


def test_settings_reach_the_engine(client, engine):
    ask(
        client,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        seed=-1,
        frequency_penalty=1,
        presence_penalty=-1,
        repetition_penalty=1.5,
        logit_bias={"5": -100},
        ignore_eos=True,
        max_tokens=5,
        max_completion_tokens=4,
        cache_salt="a",
    )
    request = engine.requests[0]
    assert (request.temperature, request.top_p, request.top_k, request.min_p) == (0.5, 0.9, 5, 0.1)
    assert request.seed == 2**32 - 1 and request.logit_bias == {5: -100}
    penalties = (request.frequency_penalty, request.presence_penalty, request.repetition_penalty)
    assert penalties == (1, -1, 1.5)
    assert request.stop_token_ids == () and request.max_new_tokens == 4
    assert request.cache_salt != ""
    ask(client, temperature=None, top_p=1, top_k=-1, min_p=0)
    request = engine.requests[1]
    assert (request.temperature, request.top_p, request.top_k, request.min_p) == (
        1,
        None,
        None,
        None,
    )
    assert request.stop_token_ids == tuple(engine.tokenizer.stop_token_ids)
    ask(client, top_p=0)
    assert engine.requests[2].temperature == 0


def test_unknown_fields_are_accepted(client):
    ask(client, user="me", store=True, metadata={"a": "b"}, service_tier="auto", foo=[1])


SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Yes"}


def turn(role, text):
    return f"<start_of_turn>{role}\n{text}<end_of_turn>\n"


MODEL = "<start_of_turn>model\n"


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([SYSTEM, USER], turn("user", "Be brief.\n\nHi") + MODEL),
        ([SYSTEM | {"role": "developer"}, USER], turn("user", "Be brief.\n\nHi") + MODEL),
        ([SYSTEM], turn("user", "Be brief.") + MODEL),
        ([USER, USER], turn("user", "Hi\n\nHi") + MODEL),
        (
            [USER, REPLY, SYSTEM, USER],
            turn("user", "Hi") + turn("model", "Yes") + turn("user", "Be brief.\n\nHi") + MODEL,
        ),
        ([USER, REPLY], turn("user", "Hi") + MODEL + "Yes"),
        ([USER, REPLY | {"content": None}], turn("user", "Hi") + MODEL),
        ([{"role": "user", "content": None}], turn("user", "") + MODEL),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                }
            ],
            turn("user", "ab") + MODEL,
        ),
        ([{"role": "user", "content": "<end_of_turn>"}], turn("user", "<end_of_turn>") + MODEL),
    ],
)
def test_lenient_messages(client, engine, messages, expected):
    assert sent(client, engine, messages) == "<bos>" + expected


def test_control_tokens_in_content_are_plain_text(client, engine):
    sent(client, engine, [{"role": "user", "content": "<end_of_turn>"}])
    ids = engine.requests[0].prompt.tolist()
    assert ids.count(engine.tokenizer.end_of_turn_token_id) == 1


def test_a_trailing_tool_call_needs_no_content(client):
    response = client.post(PATH, json={"messages": [USER, {"role": "assistant"}, USER]})
    assert response.status_code == 200


def test_model_names(client):
    for model in ("dummy", "tgi", None):
        assert ask(client, model=model)["model"] == "tiny"


def test_cached_tokens(client, engine):
    engine.cached_tokens = 3
    assert ask(client)["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


def test_the_response_names_the_served_name_of_the_request(client_of):
    client = client_of(served_names=("a", "b"))
    assert ask(client, model="b")["model"] == "b"
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["a", "b"]
    assert client.get("/v1/models/b").json()["max_model_len"] == 512
