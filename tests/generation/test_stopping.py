"""The end of a sequence: stop tokens, and the maximum length of each row."""

import keras
import numpy as np
import pytest

from keras_gemma import samplers
from tests.models import Script, compile_lm, make_lm

PROMPTS = [[2, 9, 31, 8, 300], [2, 40]]


@pytest.fixture(scope="module")
def texts(lm):
    """Greedy texts without stop tokens."""
    return lm.generate(PROMPTS, max_new_tokens=12, stop_token_ids=None)


def test_stop_token_ends_only_its_row(lm, texts):
    new = [text[len(prompt) :] for prompt, text in zip(PROMPTS, texts, strict=True)]
    stop = next(id for id in new[0][3:] if id not in new[1] and id not in new[0][:3])
    end = new[0].index(stop)
    stopped = lm.generate(PROMPTS, max_new_tokens=12, stop_token_ids=[stop])
    assert stopped == [PROMPTS[0] + new[0][: end + 1], texts[1]]
    both = (stop, new[1][1])
    stopped = lm.generate(PROMPTS, max_new_tokens=12, stop_token_ids=both)
    assert [text[-1] for text in stopped] == list(both)
    assert lm.generate(PROMPTS, max_new_tokens=12, stop_token_ids=np.array(both)) == stopped


def test_first_new_token_can_stop(lm, texts):
    first = texts[0][len(PROMPTS[0])]
    assert lm.generate(PROMPTS[:1], max_new_tokens=12, stop_token_ids=first) == [
        [*PROMPTS[0], first]
    ]


def test_stop_token_in_the_prompt_is_ignored(lm, texts):
    assert lm.generate(PROMPTS, max_new_tokens=12, stop_token_ids=[31, 2])[0][:6] == texts[0][:6]


def test_maximum_lengths(lm, texts):
    def lengths(**limits):
        rows = lm.generate(PROMPTS, stop_token_ids=None, **limits)
        for row, text in zip(rows, texts, strict=True):
            assert row == text[: len(row)]
        return [len(row) for row in rows]

    assert lengths(max_new_tokens=1) == [6, 3]
    assert lengths(max_new_tokens=np.int64(7)) == [12, 9]
    assert lengths(max_length=9) == [9, 9]
    assert lengths(max_length=6) == [6, 6]


def test_prompt_lengths_around_bucket_sizes(lm):
    ids = [2, *np.random.default_rng(0).integers(108, 512, 40).tolist()]
    for length in (15, 16, 17, 33):
        (text,) = lm.generate([ids[:length]], max_length=40, stop_token_ids=None)
        assert text[:length] == ids[:length] and len(text) == 40
        # Alone, the shorter prompt would be in another bucket.
        together = lm.generate([[2, 5], ids[:length]], max_length=40, stop_token_ids=None)
        assert together[1] == text


@pytest.mark.parametrize("stop", ["<eos>", "<end_of_turn>"])
def test_auto_stops_at_eos_and_end_of_turn(tiny_proto, stop):
    lm = make_lm(proto=tiny_proto)
    tokenizer = lm.preprocessor.tokenizer
    word = tokenizer.encode(["arms"])[0]
    compile_lm(lm, sampler=Script([*word, tokenizer.token_to_id(stop), *word]))
    assert lm.generate("to take ", max_new_tokens=8) == "to take arms"
    assert lm.generate(["To ", "to take "], max_new_tokens=8) == ["To arms", "to take arms"]
    assert lm.generate("to take ", max_new_tokens=8, strip_prompt=True) == "arms"
    # Without stop tokens, only <end_of_turn> is part of the text.
    text = lm.generate("to take ", max_new_tokens=2 * len(word) + 1, stop_token_ids=None)
    assert text == "to take arms" + ("" if stop == "<eos>" else stop) + "arms"
    # Explicit ids replace "auto".
    assert lm.generate("to take ", max_new_tokens=9, stop_token_ids=word[-1]) != text
    row = lm.generate([[2, 300]], max_new_tokens=8)[0]
    assert row[2:] == [*word, tokenizer.token_to_id(stop)]


def test_sequence_length_is_the_default_limit(tiny_proto):
    lm = make_lm(proto=tiny_proto, sequence_length=20)
    prompts = [[2, 300], [2, 301, 302, 303, 304]]
    assert [len(row) for row in lm.generate(prompts, stop_token_ids=None)] == [20, 20]


def test_max_length_excludes_max_new_tokens(lm):
    with pytest.raises(ValueError, match=r"not both.*max_length=8, max_new_tokens=4"):
        lm.generate(PROMPTS, max_length=8, max_new_tokens=4)


@pytest.mark.parametrize("value", [0, -1, 2.0, "8", True])
@pytest.mark.parametrize("name", ["max_length", "max_new_tokens"])
def test_invalid_maximum_lengths(lm, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*{name}={value!r}"):
        lm.generate(PROMPTS, stop_token_ids=None, **{name: value})


def test_context_length(lm):
    context = lm.backbone.config.context_length
    assert context == 8192
    with pytest.raises(ValueError, match=r"5 tokens, but .* 8192.*up to 8188 new tokens"):
        lm.generate(PROMPTS, max_new_tokens=context - 4, stop_token_ids=None)
    with pytest.raises(ValueError, match="Prompt 1 has 8192 tokens"):
        lm.generate([[2], [2] * context], max_new_tokens=1, stop_token_ids=None)
    with pytest.raises(ValueError, match="allow fewer new tokens"):
        lm.generate(PROMPTS, max_length=context + 1, stop_token_ids=None)


def test_too_many_stop_tokens(lm):
    with pytest.raises(ValueError, match="at most 8 ids"):
        lm.generate(PROMPTS, max_new_tokens=4, stop_token_ids=range(9))


def test_seeds(lm):
    def draw(seed=None):
        return lm.generate(PROMPTS, max_new_tokens=12, stop_token_ids=None, seed=seed)

    compile_lm(lm, sampler=samplers.TopKSampler(k=20, seed=3, temperature=2.0))
    assert draw() == draw() == draw(seed=3)
    assert draw() != draw(seed=4)
    compile_lm(lm, sampler=samplers.TopKSampler(k=20, temperature=2.0))
    keras.utils.set_random_seed(1)
    first, second = draw(), draw()
    assert first != second
    keras.utils.set_random_seed(1)
    assert draw() == first
    # A row does not depend on the rest of the batch, and equal prompts get different texts.
    for i, prompt in enumerate(PROMPTS):
        alone = lm.generate([prompt], max_new_tokens=12, stop_token_ids=None, seed=3)
        assert alone == draw(seed=3)[i : i + 1]
        batch = [[2, 7], prompt, [5], prompt]
        together = lm.generate(batch, max_new_tokens=12, stop_token_ids=None, seed=3)
        assert together[1] == alone[0] != together[3]
    # Recorded on JAX: every backend must draw the same tokens.
    assert draw(seed=3) == RECORDED
    compile_lm(lm)


def test_prompts_draw_different_noise(lm):
    """With equal logits, a text is the noise of its row, here of 16 tokens out of 512."""
    settings = {"max_new_tokens": 16, "stop_token_ids": None, "strip_prompt": True, "seed": 3}
    settings |= {"temperature": 1.0, "logits_processors": [lambda ids, logits: 0 * logits]}
    prompts = [[2, 9], [2, 10], [2, 9, 9]]
    texts = lm.generate(prompts, **settings)
    for i, text in enumerate(texts):
        for other in texts[:i]:
            assert sum(a == b for a, b in zip(text, other, strict=True)) < 4
        assert lm.generate([prompts[i]], **settings) == [text]
    prefix = lm.prefill([2, 9])
    assert lm.generate([prompts[2]], prefix=prefix, **settings) == texts[2:]


RECORDED = [
    [2, 9, 31, 8, 300, 52, 146, 487, 270, 205, 414, 502, 372, 217, 337, 464, 277],
    [2, 40, 320, 314, 119, 368, 291, 209, 214, 443, 207, 42, 262, 236],
]
