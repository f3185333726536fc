"""`/v1/completions` on a fake engine."""

import pytest

from tests.serving.sse import chunks

pytestmark = pytest.mark.once

PATH = "/v1/completions"
TEXT = "Hello there, world!"


def ask(client, prompt, **fields):
    response = client.post(PATH, json={"model": "tiny", "prompt": prompt, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def texts(answer):
    return [choice["text"] for choice in answer["choices"]]


def test_forms_of_prompts(client, engine):
    engine.text = "x"
    ids = engine.tokenizer.encode(["To be"])[0]
    bos = engine.tokenizer.start_token_id
    for prompt, expected in [
        ("To be", [[bos, *ids]]),
        ("", [[bos]]),
        (["To be", ""], [[bos, *ids], [bos]]),
        (ids, [ids]),
        ([ids, [5]], [ids, [5]]),
    ]:
        engine.requests.clear()
        answer = ask(client, prompt)
        assert [request.prompt.tolist() for request in engine.requests] == expected
        assert texts(answer) == ["x"] * len(expected)
        assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))
        assert answer["object"] == "text_completion"


def test_sixteen_tokens_by_default(client, engine):
    engine.text = "a b c d e f g h i j k l m n o p q r s t u v"
    answer = ask(client, "A")
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"


def test_choices_of_several_prompts(client, engine):
    first, second = [5, 6], [7, 8]
    engine.texts_by_prompt = {tuple(first): "one", tuple(second): "two"}
    answer = ask(client, [first, second], n=2)
    assert texts(answer) == ["one", "one", "two", "two"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    items = chunks(client.post(PATH, json={"prompt": [first, second], "n": 2, "stream": True}))
    joined = ["", "", "", ""]
    reasons = {}
    for item in items:
        (choice,) = item["choices"]
        joined[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            assert choice["text"] == ""
            reasons[choice["index"]] = choice["finish_reason"]
    assert joined == ["one", "one", "two", "two"] and reasons == dict.fromkeys(range(4), "stop")


def test_echo_with_logprobs_as_lm_eval_reads_it(client, engine):
    prompt = [5, 6, 7, 8]
    answer = ask(client, prompt, max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234)
    (choice,) = answer["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"] == [None, -1.0, -2.0, -3.0, -0.5]
    assert logprobs["top_logprobs"][0] is None
    decode = engine.tokenizer.detokenize
    for id, tops, logprob in zip(
        prompt[1:], logprobs["top_logprobs"][1:], logprobs["token_logprobs"][1:], strict=False
    ):
        assert tops == {decode([4], skip_special_tokens=False): -0.5, decode([id]): logprob}
    assert choice["text"] == "".join(logprobs["tokens"])
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)


def test_a_single_stop_token_keeps_its_place(client, engine):
    """lm-eval drops the last log-probability, which must not be one of the prompt's."""
    engine.text = ""
    (choice,) = ask(client, [5, 6], max_tokens=2, logprobs=0, echo=True)["choices"]
    assert choice["logprobs"]["tokens"][-1] == "<end_of_turn>"
    assert len(choice["logprobs"]["token_logprobs"]) == 3
    assert choice["finish_reason"] == "stop"


def test_echo_without_new_tokens(client, engine):
    answer = ask(client, "To be", max_tokens=0, echo=True, logprobs=2)
    (choice,) = answer["choices"]
    assert choice["text"] == "To be" and choice["finish_reason"] == "length"
    assert engine.requests == [] and answer["usage"]["completion_tokens"] == 0
    assert choice["logprobs"]["tokens"][0] == "<bos>"
    assert choice["logprobs"]["text_offset"][:2] == [0, 0]
    items = chunks(
        client.post(PATH, json={"prompt": "To be", "max_tokens": 0, "echo": True, "stream": True})
    )
    assert "".join(item["choices"][0]["text"] for item in items) == "To be"
    assert items[-1]["choices"][0]["finish_reason"] == "length"


def test_streamed_echo_and_offsets(client):
    body = {"prompt": "To be", "echo": True, "logprobs": 1, "max_tokens": 4}
    whole = client.post(PATH, json=body).json()["choices"][0]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    items = chunks(client.post(PATH, json=body | options))
    assert items[-1]["choices"] == [] and items[-1]["usage"]["completion_tokens"] == 4
    choices = [item["choices"][0] for item in items[:-1]]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    for name in ("tokens", "token_logprobs", "text_offset"):
        joined = [value for c in choices if c["logprobs"] for value in c["logprobs"][name]]
        assert joined == whole["logprobs"][name]


def test_best_of(client, engine):
    """The fake's copies have log-probabilities -0.5, -1.5, -2.5, by index."""
    engine.script = lambda request, index: engine.tokenizer.encode(["cba"[index]])[0]
    answer = ask(client, "A", best_of=3, n=2, max_tokens=1)
    assert texts(answer) == ["c", "b"]
    assert engine.requests[0].num_return_sequences == 3
    assert answer["choices"][0]["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 3


def test_tokens_as_ids(client):
    (choice,) = ask(
        client, [5, 6], max_tokens=1, logprobs=1, echo=True, return_tokens_as_token_ids=True
    )["choices"]
    assert choice["logprobs"]["tokens"][:2] == ["token_id:5", "token_id:6"]


def test_stop_strings_keep_the_scores_of_their_tokens(client):
    (choice,) = ask(client, "A", stop=" there", logprobs=0)["choices"]
    assert choice["text"] == "Hello" and choice["finish_reason"] == "stop"
    assert "".join(choice["logprobs"]["tokens"]).startswith("Hello t")
