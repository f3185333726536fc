"""The server on a real engine gives the same texts as `generate`."""

import json

import pytest
from starlette.testclient import TestClient

from keras_gemma.causal_lm.model import GemmaCausalLM
from keras_gemma.causal_lm.text_engine import create_text_engine
from keras_gemma.serving import ServerSettings, create_app
from tests.serving.live import live


@pytest.fixture(scope="module")
def lm():
    return GemmaCausalLM.from_preset("gemma_tiny_instruct_en")


@pytest.fixture(scope="module")
def client(lm):
    texts = create_text_engine(lm, max_batch_size=2)
    with TestClient(create_app(texts, ServerSettings())) as client:
        yield client


def test_seeded_and_greedy_texts(lm, client):
    prompts = ["To be, or", "What is"]
    body = {"prompt": prompts, "max_tokens": 12, "seed": 5, "top_k": 20, "n": 2}
    choices = client.post("/v1/completions", json=body).json()["choices"]
    expected = [
        text
        for prompt in prompts
        for text in lm.generate(
            [prompt],
            max_new_tokens=12,
            sampler="random",
            top_k=20,
            seed=5,
            num_return_sequences=2,
            strip_prompt=True,
        )[0]
    ]
    assert [choice["text"] for choice in choices] == expected
    messages = [{"role": "user", "content": "Hello"}]
    answer = client.post("/v1/chat/completions", json={"messages": messages, "temperature": 0})
    expected = lm.generate_chat(messages, sampler="greedy")
    assert answer.json()["choices"][0]["message"]["content"] == expected


def test_scores_of_prompts(lm, client):
    ids = lm.preprocessor.tokenize_prompts(["To be, or not"])[0].tolist()
    body = {"prompt": [ids], "max_tokens": 0, "echo": True, "logprobs": 1}
    (choice,) = client.post("/v1/completions", json=body).json()["choices"]
    expected = lm.score_continuations([ids[:3]], [ids[3:]])[0]
    scores = choice["logprobs"]["token_logprobs"]
    assert sum(scores[3:]) == pytest.approx(expected.log_probability, abs=1e-3)
    tops = choice["logprobs"]["top_logprobs"][3:]
    is_greedy = all(max(top.values()) == score for top, score in zip(tops, scores[3:], strict=True))
    assert is_greedy == expected.is_greedy


def test_json(client):
    body = {
        "messages": [{"role": "user", "content": "Hello"}],
        "response_format": {"type": "choice", "choices": ["yes", "no"]},
    }
    answer = client.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] in ("yes", "no")


@pytest.mark.once
def test_lm_eval(lm):
    """The unmodified client of lm-evaluation-harness, with the tokenizer of the server."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    texts = create_text_engine(lm, max_batch_size=2)
    pairs = [("To be, or", " not to be"), ("To be, or", " to do"), ("Who", " is there?")]
    with live(texts, ServerSettings(served_names=("tiny",))) as server:
        client = LocalCompletionsAPI(
            model="tiny",
            base_url=f"{server.url}/v1/completions",
            tokenizer_backend="remote",
            max_length=256,
            batch_size=2,
        )
        requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
        results = client.loglikelihood(requests, disable_tqdm=True)
    for pair, (score, is_greedy) in zip(pairs, results, strict=True):
        ids = [lm.preprocessor.tokenizer.encode([text])[0] for text in (pair[0], "".join(pair))]
        (expected,) = lm.score_continuations([ids[0]], [ids[1][len(ids[0]) :]])
        assert score == pytest.approx(expected.log_probability, abs=1e-3)
        assert is_greedy == expected.is_greedy


@pytest.mark.once
def test_lm_eval_chat(lm):
    """The client of `local-chat-completions`, as with --apply_chat_template."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.api_models import JsonChatStr
    from lm_eval.models.openai_completions import LocalChatCompletion

    texts = create_text_engine(lm, max_batch_size=2)
    chats = [[{"role": "user", "content": text}] for text in ("Hello", "What is 17 + 8?")]
    settings = {"until": ["\n\n\n"], "max_gen_toks": 12, "do_sample": False}
    with live(texts, ServerSettings(served_names=("tiny",))) as server:
        url = f"{server.url}/v1/chat/completions"
        client = LocalChatCompletion(base_url=url, model="tiny", num_concurrent=2)
        requests = [
            Instance("generate_until", {}, (JsonChatStr(json.dumps(chat)), settings), 0)
            for chat in chats
        ]
        answers = client.generate_until(requests, disable_tqdm=True)
    assert answers == [
        lm.generate_chat(chat, sampler="greedy", max_new_tokens=12) for chat in chats
    ]
