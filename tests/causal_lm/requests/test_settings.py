"""Generation settings: per batch and per prompt, at `compile` and in a call."""

import numpy as np
import pytest
from keras import ops

from keras_gemma.causal_lm.settings import GenerationSettings
from tests.models import Script, compile_lm, logits_of, make_lm

TEXTS = ["To be, or", "Whether 'tis nobler"]
IDS = [[2, 9, 31, 8, 300], [2, 40]]


def new_ids(lm, **settings):
    return lm.generate(IDS, stop_token_ids=None, strip_prompt=True, **settings)


def test_a_call_overrides_compiled_settings(lm):
    expected = new_ids(lm, max_new_tokens=5)
    drawn = new_ids(lm, max_new_tokens=5, temperature=3.0, seed=2)
    assert drawn != expected
    compile_lm(lm, max_new_tokens=5, temperature=3.0, seed=2, stop_token_ids=())
    assert lm.generate(IDS, strip_prompt=True) == drawn
    assert lm.generate(IDS, strip_prompt=True, max_new_tokens=3) == [row[:3] for row in drawn]
    assert lm.generate(IDS, strip_prompt=True, max_length=7) == [drawn[0][:2], drawn[1]]
    assert lm.generate(IDS, strip_prompt=True, sampler="greedy") == expected
    assert lm.generate(IDS, strip_prompt=True, temperature=0) == expected
    compile_lm(lm)
    assert new_ids(lm, max_new_tokens=5) == expected


def test_a_value_for_each_prompt(lm):
    per_row = {
        "max_new_tokens": [3, 6],
        "temperature": [0.5, 4.0],
        "top_k": [3, 100],
        "top_p": [0.9, 1.0],
        "min_p": [0.3, 1e-6],
        "repetition_penalty": [1.0, 3.0],
        "frequency_penalty": [0.0, 1.0],
        "presence_penalty": [2.0, 0.0],
        "seed": [5, 6],
    }
    together = new_ids(lm, **per_row)
    for i, ids in enumerate(IDS):
        alone = {name: values[i] for name, values in per_row.items()}
        assert lm.generate([ids], stop_token_ids=None, strip_prompt=True, **alone) == [together[i]]
    with pytest.raises(ValueError, match="`top_p` must be one value, or one for each prompt"):
        new_ids(lm, top_p=[0.1, 0.2, 0.3])


def test_repetition_penalty_against_its_definition(lm):
    penalty = 0.1
    (result,) = lm.generate(
        IDS[:1], max_new_tokens=8, stop_token_ids=None, repetition_penalty=penalty
    )
    text = list(IDS[0])
    for _ in range(8):
        logits = logits_of(lm, text)[-1].astype("float64")
        seen = np.unique(text)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        text.append(int(logits.argmax()))
    assert result == text
    assert result != lm.generate(IDS[:1], max_new_tokens=8, stop_token_ids=None)[0]


@pytest.mark.parametrize("more", [{}, {"draft": "prompt"}])
def test_frequency_and_presence_penalty_against_their_definition(lm, more):
    penalties = {"frequency_penalty": 10.0, "presence_penalty": -30.0}
    (result,) = lm.generate(IDS[:1], max_new_tokens=8, stop_token_ids=None, **penalties, **more)
    text, new = list(IDS[0]), []
    for _ in range(8):
        logits = logits_of(lm, text + new)[-1].astype("float64")
        counts = np.bincount(new, minlength=len(logits))
        new.append(int((logits - 10.0 * counts + 30.0 * (counts > 0)).argmax()))
    assert result == text + new
    assert result != lm.generate(IDS[:1], max_new_tokens=8, stop_token_ids=None)[0]


def test_logits_processors(lm):
    def only_after(ids, logits):
        """Allows only the id that follows the last token's id."""
        length = ops.sum(ops.cast(ids >= 0, "int32"), axis=1)
        last = ops.take_along_axis(ids, (length - 1)[:, None], axis=1)
        is_next = ops.arange(logits.shape[-1], dtype="int32")[None] == last + 1
        return ops.where(is_next, logits, -1e9)

    result = new_ids(lm, max_new_tokens=4, logits_processors=[only_after])
    assert result == [[301, 302, 303, 304], [41, 42, 43, 44]]
    with pytest.raises(ValueError, match="narrow must return logits of the shape"):

        def narrow(ids, logits):
            return logits[:, :5]

        new_ids(lm, max_new_tokens=4, logits_processors=[narrow])


def test_logprobs_are_those_of_the_model(lm):
    rows = lm.generate(
        TEXTS, max_new_tokens=7, stop_token_ids=None, return_logprobs=3, temperature=2.0, seed=1
    )
    for text, row in zip(TEXTS, rows, strict=True):
        prompt = lm.preprocessor.tokenize_prompts([text])[0].tolist()
        logits = logits_of(lm, [*prompt, *row.token_ids]).astype("float64")[len(prompt) - 1 : -1]
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        chosen = expected[np.arange(7), row.token_ids]
        np.testing.assert_allclose(row.logprobs, chosen, atol=1e-4)
        for place, top in enumerate(row.top_logprobs):
            top_ids = np.argsort(-expected[place])[:3]
            assert list(top) == top_ids.tolist()
            np.testing.assert_allclose(list(top.values()), expected[place][top_ids], atol=1e-4)
        assert row.finish_reason == "length" and row.text.startswith(text)
    (row,) = lm.generate(IDS[:1], max_new_tokens=2, return_logprobs=True)
    assert row.text is None and row.top_logprobs is None and len(row.logprobs) == 2


def test_num_return_sequences(lm):
    settings = {"max_new_tokens": 6, "temperature": 2.0, "seed": 4, "stop_token_ids": None}
    rows = lm.generate(TEXTS, num_return_sequences=3, **settings)
    assert [len(row) for row in rows] == [3, 3]
    assert all(len(set(row)) == 3 for row in rows)
    for text, row in zip(TEXTS, rows, strict=True):
        assert lm.generate(text, num_return_sequences=3, **settings) == row
        assert lm.generate(text, **settings) == row[0]
    assert lm.generate([TEXTS[0]] * 3, **settings) == rows[0]
    with pytest.raises(ValueError, match=r"`num_return_sequences` above 1 .* greedy"):
        lm.generate(TEXTS, num_return_sequences=2)


def test_stop_strings_across_tokens(tiny_proto):
    lm = make_lm(proto=tiny_proto, sequence_length=64)
    tokenizer = lm.preprocessor.tokenizer
    written = "arms against a sea of troubles"
    ids = tokenizer.encode([" " + written])[0]
    compile_lm(lm, sampler=Script([*ids, tokenizer.end_token_id]))
    assert lm.generate("take") == f"take {written}"
    for stop, left in {
        "nst a s": "take arms agai",
        "arms": "take ",
        " ": "take",
        "les": "take arms against a sea of troub",
        "lesson": f"take {written}",
        "take": f"take {written}",  # of the prompt
    }.items():
        assert lm.generate("take", stop=stop) == left
        assert lm.generate(["take", "to"], stop=[stop, "zzz"])[0] == left
        stripped = left.removeprefix("take")
        assert lm.generate("take", stop=stop, strip_prompt=True) == stripped
        assert "".join(lm.stream("take", stop=stop)) == stripped
    (row,) = lm.generate(["take"], stop="against", return_logprobs=True)
    assert row.finish_reason == "stop" and row.text == "take arms "
    assert "against" in tokenizer.detokenize(row.token_ids)
    assert "against" not in tokenizer.detokenize(row.token_ids[:-1])
    assert len(row.logprobs) == len(row.token_ids)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_length": 5, "max_new_tokens": 5}, "not both"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens=2\.5"),
        ({"max_length": True}, "max_length=True"),
        ({"num_return_sequences": 0}, "num_return_sequences=0"),
        ({"temperature": -1}, "temperature=-1"),
        ({"top_p": 0}, "top_p=0"),
        ({"top_k": 0}, "top_k=0"),
        ({"min_p": 1.5}, r"min_p=1\.5"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"frequency_penalty": "x"}, "frequency_penalty='x'"),
        ({"presence_penalty": 1e10}, "presence_penalty=1"),
        ({"seed": "x"}, "seed='x'"),
        ({"stop": ""}, "stop=''"),
        ({"stop": ["a", 3]}, r"stop=\['a', 3\]"),
        ({"return_logprobs": -1}, "return_logprobs=-1"),
        ({"return_logprobs": 1000}, "return_logprobs=1000"),
        ({"sampler": "best"}, "'best'"),
        ({"sampler": "greedy", "top_k": 3}, "greedy sampler does not use `top_k`"),
        ({"sampler": Script([1]), "top_p": 0.5}, "`top_p` cannot be changed for Script"),
    ],
)
def test_values_out_of_range(lm, settings, says):
    with pytest.raises(ValueError, match=says):
        lm.generate("To be", **settings)
    with pytest.raises(ValueError, match=says):
        GenerationSettings(**settings)


def test_other_bad_input(lm):
    with pytest.raises(TypeError, match=r"has no argument `top_q`\. Did you mean `top_"):
        lm.generate("To be", top_q=0.5)
    with pytest.raises(TypeError, match="functions"):
        lm.generate("To be", logits_processors=[3])
    with pytest.raises(ValueError, match="return_logprobs"):
        lm.stream("To be", return_logprobs=True)
    with pytest.raises(ValueError, match="Padded arrays"):
        padded = {"token_ids": [[2, 7, 0, 0]], "padding_mask": [[1, 1, 0, 0]]}
        lm.generate(padded, num_return_sequences=2, temperature=1.0)
    with pytest.raises(ValueError, match="`top_k` cannot be changed"):
        lm.compile(sampler=Script([1]), top_k=3)


def test_a_batch_that_exceeds_free_memory_is_refused(lm, monkeypatch):
    monkeypatch.setattr("keras_gemma.backend.free_memory", lambda: 10_000)
    with pytest.raises(ValueError, match=r"2 rows need about 0\.0 GB .* but only 0\.0 GB are free"):
        lm.generate(TEXTS, max_new_tokens=4)
    monkeypatch.setattr("keras_gemma.backend.free_memory", lambda: None)
    assert len(lm.generate(TEXTS, max_new_tokens=1)) == 2
