"""DPO: the closed form of the loss, training with `fit`, and errors."""

import json

import keras
import numpy as np
import pytest

from keras_gemma.training import (
    PreferenceLoss,
    answer_log_probabilities,
    chat_dataset,
    dpo_loss,
    preference_dataset,
)
from tests.models import make_lm

PAIRS = [
    {"prompt": f"to be {i}", "chosen": f"or not {i}", "rejected": "the slings and arrows"}
    for i in range(3)
]


def test_closed_form():
    random = np.random.default_rng(0)
    chosen, rejected, first, second = random.normal(size=(4, 5)).astype("float32") * 30
    for beta, smoothing in ((0.1, 0.0), (0.5, 0.2)):
        z = beta * ((chosen - first) - (rejected - second)).astype("float64")
        expected = (1 - smoothing) * np.log1p(np.exp(-z)) + smoothing * np.log1p(np.exp(z))
        losses = dpo_loss(chosen, rejected, first, second, beta, smoothing)
        losses = keras.ops.convert_to_numpy(losses)
        np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-6)
    same = keras.ops.convert_to_numpy(dpo_loss(chosen, rejected, chosen, rejected))
    np.testing.assert_allclose(same, np.log(2), rtol=1e-6)


def test_answer_log_probabilities():
    losses = np.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], "float32")
    weights = np.array([[0, 1, 1], [1, 0, 0]])
    scores = answer_log_probabilities(keras.ops.convert_to_tensor(losses), weights)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(scores), [-6, -8])


@pytest.mark.parametrize(
    ("settings", "message"), [({"beta": 0}, "beta=0"), ({"label_smoothing": 0.5}, "=0.5")]
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        dpo_loss(np.zeros(1), np.zeros(1), np.zeros(1), np.zeros(1), **settings)
    with pytest.raises(ValueError, match=message):
        PreferenceLoss(**settings)


def margins(lm, tokenizer):
    """Returns each pair's difference in log-probability, in nats, computed from the logits."""
    scores = []
    for answer in ("chosen", "rejected"):
        pairs = [{"prompt": pair["prompt"], "completion": pair[answer]} for pair in PAIRS]
        ((x, y, weights),) = chat_dataset(
            pairs, tokenizer, 64, packing=False, batch_size=3, shuffle=False
        )
        logits = keras.ops.convert_to_numpy(lm.predict_on_batch(x)).astype("float64")
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        scores.append((np.take_along_axis(logits, y[..., None], -1)[..., 0] * weights).sum(-1))
    return scores[0] - scores[1]


def test_fit_increases_the_margins(tokenizer, tiny_proto):
    lm = make_lm(proto=tiny_proto)
    lm.enable_lora(4, targets="all-linear", seed=0)
    data = preference_dataset(lm, PAIRS, 64, batch_size=2, shuffle=False)
    assert len(data) == 2  # the second has one pair of padding
    before = margins(lm, tokenizer)
    np.testing.assert_allclose(-np.diff(data.reference)[:, 0], before, rtol=1e-3)
    loss = PreferenceLoss(beta=0.3)
    lm.compile(optimizer=keras.optimizers.Adam(3e-3), loss=loss, weighted_metrics=[])
    first = lm.evaluate(data, verbose=0)
    assert first == pytest.approx(np.log(2), rel=1e-4)
    lm.fit(data, epochs=4, verbose=0)
    gained = margins(lm, tokenizer) - before
    assert (gained > 1).all()
    expected = np.log1p(np.exp(-0.3 * gained))
    losses = [lm.test_on_batch(*data[i]) for i in range(2)]
    np.testing.assert_allclose(losses, [expected[:2].mean(), expected[2]], rtol=1e-2)
    assert PreferenceLoss.from_config(loss.get_config()).beta == 0.3


def test_rows_fit_the_longest_answer(tiny_proto):
    lm = make_lm(proto=tiny_proto)
    context = lm.backbone.config.context_length
    assert preference_dataset(lm, PAIRS).length == preference_dataset(lm, PAIRS, 32).length == 32
    words = "to be " * context
    with pytest.raises(ValueError, match=f"do not fit, because sequence_length={context} "):
        preference_dataset(lm, [PAIRS[0] | {"chosen": words}])


def test_bad_pairs(tokenizer, tiny_proto, tmp_path):
    lm = make_lm(proto=tiny_proto)
    path = tmp_path / "pairs.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for bad, reason in (
        ({"prompt": "a", "chosen": "b"}, "an object with 'chosen' and 'rejected'"),
        (
            {"prompt": "a", "chosen": "b", "rejected": ""},
            "message 1, of the role .*, is empty",
        ),
        ({"chosen": turns, "rejected": turns[:1]}, "needs a user turn and a model turn"),
        ({"prompt": "to be " * 200, "chosen": "b", "rejected": "c"}, "tokens do not fit"),
    ):
        path.write_text(json.dumps(PAIRS[0]) + "\n" + json.dumps(bad))
        with pytest.raises(ValueError, match=f"pairs.jsonl, line 2: .*{reason}"):
            preference_dataset(lm, path, 64)
    with pytest.raises(ValueError, match="has no usable sample"):
        preference_dataset(lm, [], 64)
    with pytest.raises(FileNotFoundError, match=r"file of samples .* does not exist"):
        preference_dataset(lm, tmp_path / "nowhere", 64)
    with pytest.raises(ValueError, match="batch_size=0"):
        preference_dataset(lm, PAIRS, 64, batch_size=0)
    with pytest.raises(ValueError, match="no preprocessor, which training requires"):
        preference_dataset(make_lm(), PAIRS, 64)
