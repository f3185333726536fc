"""Perplexity, logit lens, attention maps, patching and attribution, each by its definition."""

import contextlib

import numpy as np
import pytest
from keras import ops

from keras_gemma import progress, scoring
from keras_gemma.scoring.gradient import gradient
from keras_gemma.scoring.perplexity import windows
from tests.models import make_lm
from tests.scoring.texts import close, numpy

TEXT = "To be, or not to be, that is the question"


@pytest.fixture(scope="module")
def lm(tiny_proto):
    return make_lm("gemma2_grouped", tiny_proto, num_layers=4)


@pytest.fixture(scope="module")
def ids(lm):
    return lm.preprocessor.tokenize_prompts([TEXT])[0]


@pytest.fixture
def bars(monkeypatch):
    """Title, total and completed amount of each progress bar."""
    rows = []

    @contextlib.contextmanager
    def bar(title, total):
        rows.append([title, total, 0])

        def advance(amount):
            rows[-1][2] += amount

        yield advance

    monkeypatch.setattr(progress, "bar", bar)
    return rows


def log_softmax(logits):
    logits = logits.astype("float64")
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_windows():
    assert windows(7, 2, 4) == [(0, 1, 4), (2, 4, 6), (4, 6, 7)]
    assert windows(4, 2, 4) == [(0, 1, 4)]
    for length in range(2, 20):
        for window in range(2, 8):
            for stride in range(1, window):
                counted = [
                    (t, t - start)
                    for start, first, end in windows(length, stride, window)
                    for t in range(first, end)
                ]
                assert [t for t, _ in counted] == list(range(1, length))
                assert all(before >= min(t, window - stride) for t, before in counted)


def test_token_scores(lm, ids):
    scores = scoring.score_tokens(lm, TEXT)
    expected = log_softmax(numpy(lm.score(ids[None]))[0])
    expected = expected[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(scores.log_probabilities[1:], expected, rtol=1e-4, atol=1e-4)
    assert np.isnan(scores.log_probabilities[0]) and scores.tokens[0] == "<bos>"
    assert "".join(scores.tokens[1:]).replace("▁", " ") == TEXT
    np.testing.assert_allclose(scores.surprisal[1:], -expected / np.log(2), rtol=1e-4, atol=1e-4)
    assert scores.perplexity == pytest.approx(np.exp(-expected.mean()), rel=1e-4)


def test_perplexity_in_windows(lm, ids):
    total = []
    for t in range(1, len(ids)):  # one token at a time, given the tokens before it in its window
        start = 0 if t < 8 else 3 * ((t - 8) // 3 + 1)
        logits = numpy(lm.score(ids[None, start:t]))[0, -1]
        total.append(log_softmax(logits)[ids[t]])
    expected = np.exp(-np.mean(total))
    assert lm.perplexity(TEXT, stride=3, window=8) == pytest.approx(expected, rel=1e-4)
    many = lm.perplexity([TEXT, "To die"], stride=3, window=8)
    assert many[0] == pytest.approx(expected, rel=1e-4) and many.shape == (2,)
    assert lm.perplexity([ids.tolist()], stride=3, window=8)[0] == pytest.approx(many[0])


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"texts": TEXT, "stride": 8, "window": 8}, ValueError, "below window=8.*stride=8"),
        ({"texts": TEXT, "stride": 2.0}, ValueError, r"an integer from .*stride=2\.0"),
        ({"texts": TEXT, "window": 0}, ValueError, r"from 2 to 8192.*window=0"),
        ({"texts": TEXT, "window": 9000}, ValueError, "context is 8192.*window=9000"),
        ({"texts": [TEXT, "die", 3]}, ValueError, r"`texts\[2\]` must be integer ids"),
        ({"texts": [TEXT, ["die"]]}, TypeError, r"`texts\[1\]` must be one string"),
        ({"texts": TEXT, "stride": 0}, ValueError, "stride=0"),
        ({"texts": ""}, ValueError, "at least two tokens"),
        ({"texts": []}, ValueError, "an empty list"),
        ({"texts": 3}, TypeError, "must be a string, or a list"),
    ],
)
def test_perplexity_errors(lm, arguments, error, says):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "score", None)  # arguments are checked before scoring
        with pytest.raises(error, match=says):
            lm.perplexity(**arguments)


def test_logit_lens(lm, ids):
    """The last row is the model's prediction; the first applies the head to the embeddings."""
    lens = scoring.logit_lens(lm, TEXT)
    rows, columns = 1 + lm.backbone.config.num_layers, len(ids)
    assert lens.probabilities.shape == (rows, columns) and len(lens.stages) == rows
    own = log_softmax(numpy(lm.score(ids[None]))[0])
    close(lens.probabilities[-1], np.exp(own.max(-1)))
    tokenizer = lm.preprocessor.tokenizer
    assert lens.predictions[-1] == [tokenizer.id_to_token(int(i)) for i in own.argmax(-1)]
    close(lens.losses[-1], -own[np.arange(columns - 1), ids[1:]])
    backbone = lm.backbone
    vectors = backbone.token_embedding(ids[None]) * backbone.config.embedding_scale
    early = backbone.token_embedding(backbone.layer_norm(vectors), reverse=True)
    close(lens.probabilities[0], np.exp(log_softmax(numpy(early)[0]).max(-1)))


def test_attention_maps(lm, ids):
    maps = scoring.attention_maps(lm, TEXT, -1)
    assert maps.layer == 3 and maps.weights.shape == (4, len(ids), len(ids))
    np.testing.assert_allclose(maps.weights.sum(-1), 1, atol=1e-5)
    assert not np.triu(maps.weights, 1).any()
    local = scoring.attention_maps(lm, TEXT, 0).weights
    assert not np.tril(local, -4).any()  # the window is 4
    for layer in (4, -5, 2.0, "3", None):
        with pytest.raises(ValueError, match=rf"from -4 to 3.*layer={layer!r}"):
            scoring.attention_maps(lm, TEXT, layer)


def test_text_of_one_token(lm):
    """Keras warns about a softmax over one element, and warnings are errors in these tests."""
    (weights,) = scoring.trace(lm, [2], "block.0.attention.weights").values()
    assert numpy(weights).tolist() == [[[[1.0]]] * 4]
    assert scoring.logit_lens(lm, [2]).losses.shape == (5, 0)
    assert scoring.gradient_times_input(lm, [2], 40).scores.shape == (1,)


def test_patching_matches_single_patches(lm, ids):
    other = ids.copy()
    other[3] = (other[3] + 7) % 512
    grid = scoring.activation_patching(lm, ids, other, 40, hook_point="attention.output")
    assert grid.clean == pytest.approx(log_softmax(numpy(lm.score(ids[None]))[0, -1])[40], abs=1e-4)
    for layer, position in ((0, 3), (2, len(ids) - 1), (3, 5)):
        name = f"block.{layer}.attention.output"
        clean = numpy(scoring.trace(lm, ids, name)[name])

        def patch(x, _, clean=clean, position=position):
            x = numpy(x).copy()
            x[:, position] = clean[:, position]
            return x

        logits = numpy(lm.score(other[None], hooks={name: patch}))[0, -1]
        assert grid.scores[layer, position] == pytest.approx(log_softmax(logits)[40], abs=1e-4)
    # Patches before the first difference have no effect.
    np.testing.assert_allclose(grid.scores[:, :3], grid.corrupted, atol=1e-4)


def test_patching_the_last_residual_recovers_everything(lm, ids, bars):
    other = ids.copy()
    other[3] = (other[3] + 7) % 512
    grid = scoring.activation_patching(lm, ids, other, 40)
    assert grid.recovered.shape == (4, len(ids))
    np.testing.assert_allclose(grid.recovered[-1, -1], 1, atol=1e-3)
    np.testing.assert_allclose(grid.recovered[-1, :-1], 0, atol=1e-3)
    assert bars == [["Patching", 4, 4]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"corrupted": "To be"}, "same number of tokens"),
        ({"answer": "question mark"}, "one token"),
        ({"answer": "<eos>"}, "as ids"),
        ({"answer": ["a"]}, r"integer from 0 to 511.*a string of one token.*answer=\['a'\]"),
        ({"answer": 512}, "answer=512"),
        ({}, "must differ in at least one token"),
        ({"hook_point": "attention.weights"}, "hook_point='attention.weights'"),
        ({"place": "attention.weights"}, "hook_point='attention.weights'"),
        ({"clean": [600]}, r"`clean` must be in \[0, 511\]"),
    ],
)
def test_patching_errors(lm, change, says):
    arguments = {"clean": TEXT, "corrupted": TEXT, "answer": 5, **change}
    with pytest.raises(ValueError, match=says):
        scoring.activation_patching(lm, **arguments)


def test_gradient_of_a_function():
    x = np.array([[1.0, 2.0], [3.0, -4.0]], "float32")
    slope = gradient(lambda x: ops.sum(x**3, axis=1), x)
    np.testing.assert_allclose(slope, 3 * x**2, rtol=1e-6)


def test_gradient_times_input_is_a_slope(lm, ids):
    """Compares with finite differences: scales the embedding of one position at a time."""
    shares = scoring.gradient_times_input(lm, TEXT, 40)
    assert shares.scores.shape == (len(ids),) and shares.baseline is None
    vectors = numpy(lm.backbone.token_embedding(ids[None]))

    def ask(change):
        """Returns the answer's log-probability `[T]` in copies of the text, each with a change."""
        x = vectors * (1 + change * np.eye(len(ids), dtype="float32")[..., None])
        rows = np.repeat(ids[None], len(ids), axis=0)
        logits = lm.score(rows, hooks={"embeddings": lambda _, name: x})
        return log_softmax(numpy(logits)[:, -1])[:, 40]

    step = 2e-3
    slopes = (ask(step) - ask(-step)) / (2 * step)
    largest = np.abs(shares.scores).max()
    np.testing.assert_allclose(shares.scores, slopes, rtol=0, atol=0.03 * largest)


def test_integrated_gradients_sum_to_the_change(lm, ids, bars):
    shares = scoring.integrated_gradients(lm, ids, 40, steps=256)
    change = shares.log_probability - shares.baseline
    assert shares.scores.sum() == pytest.approx(change, rel=0.02, abs=0.02)
    assert shares.scores[0] == 0  # <bos> is the same in both texts
    assert bars == [["Integrating", 256, 256]]
    for wrong in ({"steps": 0}, {"steps": 2.5}, {"steps": "8"}, {"baseline": 512}):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"`{name}` must be an? .*integer.*{name}={value!r}"):
            scoring.integrated_gradients(lm, TEXT, 40, **wrong)


def test_attribution_does_not_change_the_model(lm):
    before = [numpy(weight).copy() for weight in lm.weights]
    scoring.gradient_times_input(lm, TEXT, 40)
    for weight, value in zip(lm.weights, before, strict=True):
        np.testing.assert_array_equal(numpy(weight), value)
        assert getattr(weight.value, "grad", None) is None
