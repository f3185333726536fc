"""Logits, losses and the hook, against the model's own forward pass and NumPy."""

import numpy as np
import pytest
from keras import ops

from tests.generation.models import make_lm

IDS = np.array([[2, 9, 31, 8, 300, 77, 5], [2, 400, 3, 17, 60, 0, 0]], "int32")
MASK = np.array([[1] * 7, [1] * 5 + [0] * 2], "int32")


@pytest.fixture(scope="module", params=["gemma1_multi_query", "gemma2_grouped"])
def lm(request):
    return make_lm(request.param)


def numpy(x):
    return ops.convert_to_numpy(x)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_logits_are_those_of_predict(lm):
    expected = lm.predict({"token_ids": IDS, "padding_mask": MASK}, verbose=0)
    logits = numpy(lm.score(IDS, MASK))
    assert logits.dtype == "float32" and logits.shape == (2, 7, 512)
    close(logits, expected)
    # Padding stands behind, where causality hides it: without a mask the text is the same.
    close(numpy(lm.score(IDS))[:, :5], expected[:, :5])
    close(numpy(lm.score(IDS.tolist(), MASK.astype("bool"))), expected)


def test_the_final_soft_cap_is_in(lm):
    cap = lm.backbone.config.final_logit_soft_cap
    largest = np.abs(numpy(lm.score(IDS))).max()
    assert largest > 3 if cap is None else 2 < largest <= cap


def test_loss(lm):
    targets = np.roll(IDS, -1, axis=1)
    logits = numpy(lm.score(IDS, MASK)).astype("float64")
    likelihoods = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(likelihoods, targets[..., None], axis=-1)[..., 0]
    loss = lm.score(IDS, MASK, scoring_mode="loss", target_ids=targets)
    np.testing.assert_allclose(numpy(loss), expected, rtol=1e-4, atol=1e-4)


def test_the_hook_sees_every_layer_in_order(lm):
    seen = []

    def watch(x, layer):
        seen.append((layer, tuple(x.shape)))
        return x

    close(numpy(lm.score(IDS, MASK, layer_intercept_fn=watch)), numpy(lm.score(IDS, MASK)))
    layers = range(-1, lm.backbone.config.num_layers)
    assert seen == [(layer, (2, 7, 32)) for layer in layers]


def test_the_embeddings_can_be_replaced(lm):
    other = (IDS + 100) % 512
    vectors = lm.backbone.token_embedding(ops.convert_to_tensor(other))
    patched = lm.score(IDS, MASK, layer_intercept_fn=lambda x, i: vectors if i == -1 else x)
    close(numpy(patched), numpy(lm.score(other, MASK)))


def test_the_output_of_every_block_can_be_replaced(lm):
    """The rest of the way from another text's activations is the rest of that text's way."""
    other = (IDS + 100) % 512
    kept = {}

    def keep(x, layer):
        kept[layer] = x
        return x

    expected = numpy(lm.score(other, MASK, layer_intercept_fn=keep))
    for layer in kept:
        patched = lm.score(
            IDS, MASK, layer_intercept_fn=lambda x, i, at=layer: kept[at] if i == at else x
        )
        close(numpy(patched), expected)


def test_the_hook_sees_embeddings_before_they_are_scaled(lm):
    def check(x, layer):
        if layer == -1:
            table = lm.backbone.named_weights()["token_embedding"].numpy()
            np.testing.assert_allclose(numpy(x), table[IDS], rtol=1e-6)
        return x

    lm.score(IDS, layer_intercept_fn=check)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"scoring_mode": "probabilities"}, "scoring_mode='probabilities'"),
        ({"scoring_mode": "loss"}, "`target_ids` must be given"),
        ({"scoring_mode": "loss", "target_ids": IDS[:, 1:]}, r"\(2, 6\).*\(2, 7\)"),
        ({"scoring_mode": "loss", "target_ids": IDS + 500}, r"`target_ids` must be in \[0, 511\]"),
        ({"token_ids": IDS + 500}, r"`token_ids` must be in \[0, 511\].*ids from 500 to 900"),
        ({"token_ids": IDS - 1}, "ids from -1 to 399"),
        ({"token_ids": IDS[0]}, r"\[batch, tokens\]. Received: shape \(7,\)"),
        ({"layer_intercept_fn": lambda x, i: None}, "At layer -1 .* returned None"),
        ({"layer_intercept_fn": lambda x, i: x[:, 1:]}, r"\(2, 7, 32\) and returned \(2, 6, 32\)"),
        ({"layer_intercept_fn": lambda x, i: 0.0}, r"returned \(\)"),
    ],
)
def test_errors(lm, arguments, says):
    with pytest.raises(ValueError, match=says):
        lm.score(**{"token_ids": IDS, "padding_mask": MASK, **arguments})
