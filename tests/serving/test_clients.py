"""Unmodified clients on a real server with a fake engine."""

import asyncio

import anthropic
import openai
import pytest
from langchain_openai import ChatOpenAI

pytestmark = pytest.mark.once

HELLO = [{"role": "user", "content": "Hi"}]
TEXT = "Hello there, world!"


@pytest.fixture
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(live):
    with anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0) as client:
        yield client


def test_openai_chat(client):
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, n=2, logprobs=True, top_logprobs=2, seed=1
    )
    assert [choice.message.content for choice in answer.choices] == [TEXT, TEXT]
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].logprob == -0.5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id


def test_openai_stream(client):
    stream = client.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert chunks[-1].choices[0].finish_reason == "stop" and last.usage.completion_tokens
    with client.chat.completions.stream(model="tiny", messages=HELLO) as helper:
        assert helper.get_final_completion().choices[0].message.content == TEXT


def test_openai_async(live):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
            stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
            parts = [chunk.choices[0].delta.content async for chunk in stream]
            create = client.chat.completions.create
            answers = await asyncio.gather(
                *(create(model="tiny", messages=HELLO) for _ in range(4))
            )
        return "".join(filter(None, parts)), {a.choices[0].message.content for a in answers}

    assert asyncio.run(ask()) == (TEXT, {TEXT})


def test_openai_completions_and_models(client):
    answer = client.completions.create(model="tiny", prompt=[[5, 6], [7]], logprobs=1, echo=True)
    assert answer.choices[1].logprobs.token_logprobs[0] is None
    stream = client.completions.create(model="tiny", prompt="A", stream=True, max_tokens=50)
    assert "".join(chunk.choices[0].text for chunk in stream) == TEXT
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "keras-gemma"


def test_openai_responses(client):
    answer = client.responses.create(model="tiny", input="Hi", instructions="Be brief.")
    assert answer.output_text == TEXT and answer.status == "completed"
    cut = client.responses.create(model="tiny", input=HELLO, max_output_tokens=1)
    assert cut.incomplete_details.reason == "max_output_tokens"
    events = list(client.responses.create(model="tiny", input="Hi", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == TEXT
    with client.responses.stream(model="tiny", input="Hi") as stream:
        assert stream.get_final_response().output_text == TEXT
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="tiny", input="a", previous_response_id="r")


def test_openai_errors(client, engine):
    create = client.chat.completions.create
    with pytest.raises(openai.BadRequestError, match="temperature") as raised:
        create(model="tiny", messages=HELLO, temperature=3)
    assert raised.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as raised:
        create(model="tiny", messages=HELLO, max_tokens=1000)
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        create(model="gpt-4", messages=HELLO)
    engine.failure = RuntimeError()
    with pytest.raises(openai.InternalServerError):
        create(model="tiny", messages=HELLO)
    engine.is_full = True
    with pytest.raises(openai.RateLimitError, match="queue is full") as raised:
        create(model="tiny", messages=HELLO, stream=True)
    assert raised.value.response.headers["retry-after"] == "2"


def test_openai_error_in_a_stream(client, engine):
    step = engine.step

    def failing():
        engine.failure = RuntimeError() if engine.running else None
        step()

    engine.step = failing
    with pytest.raises(openai.APIError, match="failed to answer"):
        list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True))


def test_anthropic(claude, engine):
    answer = claude.messages.create(
        model="tiny", max_tokens=50, messages=HELLO, system="Be brief.", stop_sequences=["world"]
    )
    assert answer.content[0].text == "Hello there, "
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "world")
    count = claude.messages.count_tokens(model="tiny", messages=HELLO, system="Be brief.")
    assert count.input_tokens == answer.usage.input_tokens
    with claude.messages.stream(model="tiny", max_tokens=50, messages=HELLO) as stream:
        assert "".join(stream.text_stream) == TEXT
        message = stream.get_final_message()
    assert message.stop_reason == "end_turn" and message.usage.output_tokens == 16
    assert claude.messages.create(model="tiny", max_tokens=2, messages=HELLO).stop_reason == (
        "max_tokens"
    )
    with pytest.raises(anthropic.BadRequestError, match="text"):
        image = {"type": "image", "source": {"type": "base64", "data": "", "media_type": "a"}}
        claude.messages.create(
            model="tiny", max_tokens=5, messages=[{"role": "user", "content": [image]}]
        )
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="claude", max_tokens=5, messages=HELLO)
    engine.is_full = True
    with pytest.raises(anthropic.RateLimitError):
        claude.messages.create(model="tiny", max_tokens=5, messages=HELLO)


def test_hugging_face(live):
    from huggingface_hub import InferenceClient

    client = InferenceClient(live.url)
    answer = client.chat_completion(HELLO, max_tokens=50)
    assert answer.choices[0].message.content == TEXT
    parts = client.chat_completion(HELLO, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == TEXT
    assert client.text_generation("A", max_new_tokens=50) == TEXT
    details = client.text_generation("A", max_new_tokens=3, details=True, seed=5, do_sample=True)
    assert details.details.finish_reason == "length" and details.details.seed == 5
    # The client also yields the text of special tokens, as with TGI.
    pieces = client.text_generation("A", max_new_tokens=50, stream=True)
    assert "".join(pieces) == TEXT + "<end_of_turn>"


def test_langchain(live):
    chat = ChatOpenAI(base_url=f"{live.url}/v1", api_key="none", model="tiny")
    assert chat.invoke("Hi").content == TEXT
    assert "".join(chunk.content for chunk in chat.stream("Hi")) == TEXT


@pytest.mark.filterwarnings("ignore")  # litellm's own, on import
def test_litellm(live, engine, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # read on import: no download
    import litellm

    options = {"api_base": f"{live.url}/v1", "api_key": "none", "num_retries": 0}
    answer = litellm.completion("openai/tiny", HELLO, **options)
    assert answer.choices[0].message.content == TEXT and answer.usage.prompt_tokens
    chunks = list(litellm.completion("openai/tiny", HELLO, stream=True, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert chunks[-1].choices[0].finish_reason == "stop"
    text = litellm.text_completion(model="text-completion-openai/tiny", prompt="A", **options)
    assert text.choices[0].text == TEXT
    claude = {"api_base": live.url, "api_key": "none", "max_tokens": 50}
    answer = litellm.completion("anthropic/tiny", HELLO, **claude)
    assert answer.choices[0].message.content == TEXT
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion("openai/tiny", HELLO, temperature=3, **options)
    engine.is_full = True
    with pytest.raises(litellm.RateLimitError):
        litellm.completion("openai/tiny", HELLO, max_retries=0, **options)
