"""`choose` and `score_continuations`, compared with transformers and with `score`."""

import numpy as np
import pytest

from keras_gemma.scoring import continuations
from tests.configurations import CONFIGURATIONS
from tests.models import make_lm
from tests.parity.pairs import make_ours, make_theirs
from tests.scoring.texts import numpy


def random_pairs(vocabulary_size, seed=0):
    """Prompts that share their beginnings, in any order, with continuations that share theirs."""
    generator = np.random.default_rng(seed)

    def ids(low, high):
        return generator.integers(3, vocabulary_size, generator.integers(low, high))

    pairs = []
    for _ in range(2):
        header = ids(1, 20)
        for _ in range(3):
            prompt = np.concatenate([[2], header, ids(0, 12)])
            pairs += [(prompt, generator.integers(3, 5, generator.integers(1, 5))) for _ in "1234"]
    pairs += [(np.array([2]), ids(1, 4)), pairs[0]]
    return [pairs[i] for i in generator.permutation(len(pairs))]


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks, sizes of the cache, and passes of the head, with few tokens."""
    monkeypatch.setattr(continuations, "CHUNK_TOKENS", 16)
    monkeypatch.setattr(continuations, "MIN_PATH_SLOTS", 8)
    monkeypatch.setattr(continuations, "SLOT_STEP", 2)
    monkeypatch.setattr(continuations, "MAX_SCORED_LOGITS", 8 * 512)


@pytest.mark.parametrize("name", ["gemma1_multi_query", "gemma2_grouped", "gemma3"])
def test_transformers(name, small_chunks):
    import torch

    ours, theirs = make_ours(CONFIGURATIONS[name]), make_theirs(CONFIGURATIONS[name])
    scorer = continuations.ContinuationScorer(ours)
    pairs = random_pairs(ours.config.vocabulary_size)
    scores = dict(scorer.score(pairs))
    assert sorted(scores) == list(range(len(pairs)))
    for i, (prompt, continuation) in enumerate(pairs):
        ids = torch.tensor(np.concatenate([prompt, continuation])[None])
        with torch.no_grad():
            logits = theirs(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        expected = logits.gather(-1, ids[0, len(prompt) :, None]).sum().item()
        greedy = logits.argmax(-1).tolist() == continuation.tolist()
        assert scores[i].log_probability == pytest.approx(expected, abs=1e-4 * len(continuation))
        assert scores[i].is_greedy == greedy
        assert scores[i].num_tokens == len(continuation)


def test_tokens_are_reported(small_chunks):
    lm, read = make_lm(), []
    pairs = random_pairs(512)
    list(lm.continuation_scorer.score(pairs, read.append))
    texts = {tuple(np.concatenate(pair)) for pair in pairs}
    assert sum(read) == len({text[: i + 1] for text in texts for i in range(len(text) - 1)})


def test_the_head_gets_full_blocks(small_chunks, monkeypatch):
    scorer, rows = make_lm().continuation_scorer, []
    head = scorer._head

    def watched(weights, x, own, targets):
        rows.append((len(x), len(own)))
        return head(weights, x, own, targets)

    monkeypatch.setattr(scorer, "_head", watched)
    list(scorer.score([(np.array([2]), np.arange(5, 60))]))
    assert rows == [(8, 8)] * 6 + [(7, 7)]
    rows.clear()
    choices = [np.array([first, 9]) for first in range(10, 20)]
    list(scorer.score([(np.array([2]), choice) for choice in choices]))
    assert rows == [(7, 16), (4, 4)]


@pytest.fixture(scope="module")
def lm():
    from keras_gemma import models

    return models.GemmaCausalLM.from_preset("gemma_tiny_en", dtype="float32")


def by_score(lm, prompt, continuation):
    """Log-probability by `score`, with the tokens of the whole text."""
    prompt_ids, ids = lm.preprocessor.tokenize_prompts([prompt, prompt + continuation])
    losses = lm.score(ids[None], scoring_mode="loss", target_ids=np.roll(ids, -1)[None])
    return -numpy(losses)[0, len(prompt_ids) - 1 : -1].sum()


def test_choose(lm):
    prompt, choices = "To be, or not to", [" be", " bees and more", " be, that is"]
    log_probabilities = lm.choose(prompt, choices)
    assert log_probabilities.shape == (3,) and log_probabilities.dtype == "float64"
    expected = [by_score(lm, prompt, choice) for choice in choices]
    np.testing.assert_allclose(log_probabilities, expected, atol=1e-4)
    # The space belongs to the word, wherever it is written.
    np.testing.assert_allclose(lm.choose(prompt + " ", ["be"]), expected[:1], atol=1e-4)


def test_greedy_text_is_greedy(lm):
    prompt = "ROMEO:\n"
    text = lm.generate(prompt, max_new_tokens=8, strip_prompt=True, sampler="greedy")
    ids = lm.preprocessor.tokenize_prompts([prompt, prompt + text])
    new = ids[1][len(ids[0]) :]
    (score,) = lm.score_continuations([ids[0]], [new])
    assert score.is_greedy and score.num_tokens == len(new)
    other = new.copy()
    other[-1] += 1
    assert not lm.score_continuations([ids[0]], [other])[0].is_greedy


def test_empty_prompt_and_ids(lm):
    bos = lm.preprocessor.tokenizer.start_token_id
    word = lm.preprocessor.tokenizer.encode([" be"])[0]
    scores = lm.score_continuations(["", [bos], [bos]], [" be", " be", word])
    assert scores[0] == scores[1] == scores[2]


def test_training_between_calls_counts():
    lm = make_lm()
    before = lm.continuation_scorer
    (first,) = dict(before.score([(np.array([2, 5]), np.array([7]))])).values()
    for weight in lm.backbone.weights:
        weight.assign(weight * 1.5)
    (second,) = dict(before.score([(np.array([2, 5]), np.array([7]))])).values()
    assert abs(first.log_probability - second.log_probability) > 1e-3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("To be", []), ValueError, "`choices` must have at least one choice"),
        (("To be", " or"), TypeError, "`choices` must be a list"),
        (("To be", [" or", ""]), ValueError, r"`continuations\[1\]` must have at least one token"),
        (("To be " * 400, [" or"]), ValueError, "must fit into the model's context"),
        (([2, 99999], [" or"]), ValueError, r"`prompts\[0\]` must be in"),
    ],
)
def test_wrong_arguments(lm, arguments, error, message):
    with pytest.raises(error, match=message):
        lm.choose(*arguments)


def test_lists_of_different_length(lm):
    with pytest.raises(ValueError, match="must have the same length"):
        lm.score_continuations(["To be", "or"], [" not"])
    with pytest.raises(TypeError, match="`prompts` must be a list"):
        lm.score_continuations("To be", [" or"])
