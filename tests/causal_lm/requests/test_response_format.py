"""Structured output: valid, equal to a slow loop, and without compilation for each format."""

import json

import numpy as np
import pytest
from keras import ops

from keras_gemma import GemmaCausalLM, samplers
from keras_gemma.generation import session
from keras_gemma.generation.samplers.noise import gumbel, hash_ids
from keras_gemma.text.grammar import GrammarCompiler
from tests.models import compile_lm, logits_of, make_lm, on_torch

SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "capital": {"enum": ["Paris", "Zürich"]},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["n", "capital", "flags"],
    "additionalProperties": False,
}
CHOICE = {"type": "choice", "choices": ["Paris", "Rome", "I do not know"]}
CHATS = [[{"role": "user", "content": text}] for text in ("What is 17 + 8?", "Hello!")]


@pytest.fixture(scope="module")
def lm():
    lm = GemmaCausalLM.from_preset("gemma_tiny_instruct_en")
    compile_lm(lm)
    return lm


def slowly(lm, prompt, response_format, temperature=0.0, seed=0):
    """Returns the new tokens up to a stop token: scores of the whole text, mask, and argmax."""
    tokenizer = lm.preprocessor.tokenizer
    constraint = GrammarCompiler(tokenizer).compile(response_format)()
    size, ids = tokenizer.vocabulary_size(), []
    while not ids or ids[-1] not in tokenizer.stop_token_ids:
        if ids:
            constraint.accept(ids[-1])
        logits = logits_of(lm, [*prompt, *ids], length=128)[-1].astype("float64")
        if temperature:
            key = np.array([hash_ids(np.array(prompt, "int32"))], "uint32").view("int32")
            step = np.array([len(ids)], "int32")
            words = map(ops.convert_to_tensor, (np.array([seed], "int32"), key, step))
            noise = gumbel(*words, ops.arange(size, dtype="int32")[None])
            logits = logits / temperature + ops.convert_to_numpy(noise)[0]
        bits = np.unpackbits(constraint.allowed().view("uint8"), bitorder="little")[:size]
        ids.append(int(np.where(bits == 1, logits, -np.inf).argmax()))
    return ids


@pytest.mark.parametrize("drawn", [{}, {"temperature": 2.0, "seed": 3}])
def test_equals_a_slow_loop(lm, drawn):
    replies = lm.generate_chat(
        CHATS, max_new_tokens=60, response_format=SCHEMA, return_logprobs=True, **drawn
    )
    for chat, reply in zip(CHATS, replies, strict=True):
        prompt = lm.preprocessor.tokenizer.apply_chat_template(chat)
        assert reply.token_ids == slowly(lm, prompt, SCHEMA, **drawn)
        value = json.loads(reply.text)
        assert value.keys() == SCHEMA["properties"].keys()
        assert value["capital"] in ("Paris", "Zürich")
        assert reply.finish_reason == "stop"


def test_logprobs_are_those_of_the_model(lm):
    (reply,) = lm.generate_chat(
        CHATS[1:], max_new_tokens=9, response_format=CHOICE, return_logprobs=True
    )
    prompt = lm.preprocessor.tokenizer.apply_chat_template(CHATS[1])
    logits = logits_of(lm, [*prompt, *reply.token_ids], length=128).astype("float64")
    logits = logits[len(prompt) - 1 : -1]
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = expected[np.arange(len(reply.token_ids)), reply.token_ids]
    np.testing.assert_allclose(reply.logprobs, expected, atol=2e-4)
    assert reply.logprobs.min() < -5  # The model would have said "Hello!".


def test_stream_chat_and_sequences(lm):
    options = {"response_format": CHOICE, "max_new_tokens": 20}
    reply = lm.generate_chat(CHATS[1], **options)
    assert reply in CHOICE["choices"]
    assert lm.chat(**options).send("Hello!") == reply
    assert "".join(lm.chat(**options).stream("Hello!")) == reply
    pieces = list(lm.stream(["Hello!", "Rome"], **options))
    assert set(map("".join, zip(*pieces, strict=True))) <= set(CHOICE["choices"])
    texts = lm.generate_chat(CHATS[0], num_return_sequences=2, temperature=1e6, seed=3, **options)
    assert set(texts) <= set(CHOICE["choices"])
    assert len(set(texts)) > 1


def test_stop_strings_and_length(lm):
    text = lm.generate_chat(CHATS[0], response_format=SCHEMA, stop=",", max_new_tokens=60)
    assert text.startswith('{"n":')
    assert "," not in text
    assert len(lm.generate_chat(CHATS[0], response_format=SCHEMA, max_new_tokens=3)) < 9


def test_compiled_formats(lm):
    compile_lm(lm, response_format=CHOICE)
    assert lm.generate_chat(CHATS[1]) in CHOICE["choices"]
    assert lm.generate_chat(CHATS[1], response_format={"type": "text"}) == "Hello!"
    assert lm.get_compile_config()["response_format"] == CHOICE
    compile_lm(lm)


def test_formats_do_not_recompile(lm, monkeypatch):
    if on_torch():
        pytest.skip("PyTorch compiles blocks, not programs")
    lm.generate_chat(CHATS, max_new_tokens=9, response_format=CHOICE)

    def fail(*args):
        raise AssertionError("compiled again")

    monkeypatch.setattr(session, "next_logits", fail)
    lm.generate_chat(CHATS, max_new_tokens=9, response_format={"type": "regex", "regex": "a+b"})
    lm.generate_chat(CHATS, max_new_tokens=9, response_format={"type": "json_object"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": samplers.BeamSampler(num_beams=2)}, "a sampler that decodes token by token"),
        ({"sampler": "contrastive"}, "a sampler that decodes token by token"),
        ({"draft": "prompt"}, "does not support a `draft`"),
        ({"stop_token_ids": None}, r"must have the ids \[1, 107\].*Leave `stop_token_ids` out"),
        ({"response_format": {"type": "regex", "regex": "("}}, "unclosed group"),
    ],
)
def test_excluded_arguments(lm, arguments, message):
    with pytest.raises(ValueError, match=f"(?s)`response_format`.*{message}"):
        lm.generate("Hello!", max_new_tokens=5, **{"response_format": CHOICE, **arguments})


def test_excluded_models(lm, tmp_path):
    class Stepwise(GemmaCausalLM):
        def generate_step(self, *args, **kwargs):
            raise AssertionError

    stepwise = Stepwise(lm.backbone, lm.preprocessor)
    with pytest.raises(ValueError, match=r"overrides `generate_step`.*support `response_format`"):
        stepwise.generate("Hello!", response_format=CHOICE)
    with pytest.raises(ValueError, match="preprocessor"):
        make_lm().generate([[2]], response_format=CHOICE, max_new_tokens=2, stop_token_ids=None)
    compile_lm(lm, response_format=CHOICE)
    with pytest.raises(ValueError, match="served model does not support `response_format`"):
        lm.export(tmp_path / "served")
    compile_lm(lm)
    with pytest.raises(TypeError, match="`response_format` must be a dict"):
        lm.generate("Hello!", response_format="json")
