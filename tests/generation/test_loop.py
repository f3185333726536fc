"""Samplers called with a function that returns logits, as in KerasHub. KerasHub is the judge."""

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

from keras_gemma import samplers

VOCABULARY, HIDDEN, LENGTH = 12, 4, 9
TABLE = np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY)).astype("float32") * 3
VECTORS = np.random.default_rng(1).normal(size=(VOCABULARY, HIDDEN)).astype("float32")


def next_logits(prompt, cache, index):
    """The logits depend on the previous token and on the row's cache, which counts calls."""
    previous = ops.cast(ops.take(prompt, ops.maximum(index - 1, 0), axis=1), "int32")
    logits = ops.take(ops.convert_to_tensor(TABLE), previous, axis=0)
    logits = logits + 0.1 * ops.cast(cache["calls"], "float32")[:, None] * ops.roll(logits, 1, 1)
    hidden = ops.take(ops.convert_to_tensor(VECTORS), previous, axis=0)
    return logits, hidden, {"calls": cache["calls"] + 1}


def decode(sampler, **arguments):
    prompt = np.full((2, LENGTH), 11, "int32")
    prompt[0, :3], prompt[1, :5] = [1, 2, 3], [4, 5, 6, 7, 8]
    mask = prompt != 11
    arguments = {"stop_token_ids": None, **arguments}
    result = sampler(
        next=next_logits,
        prompt=ops.convert_to_tensor(prompt),
        cache={"calls": ops.zeros(2, dtype="int32")},
        index=3,
        mask=ops.convert_to_tensor(mask),
        hidden_states=ops.convert_to_tensor(np.repeat(VECTORS[None, :LENGTH], 2, 0)),
        **arguments,
    )
    return keras.tree.map_structure(ops.convert_to_numpy, result)


PAIRS = {
    "greedy": (samplers.GreedySampler(), keras_hub.samplers.GreedySampler()),
    "top_k": (samplers.TopKSampler(k=1), keras_hub.samplers.TopKSampler(k=1)),
    "top_p": (samplers.TopPSampler(p=1e-4), keras_hub.samplers.TopPSampler(p=1e-4)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_tokens_equal_keras_hub(name):
    ours, theirs = map(decode, PAIRS[name])
    np.testing.assert_array_equal(ours, theirs)


def one_row(sampler, length=5):
    """Decodes one row, with all tokens before `index` kept."""
    result = sampler(
        next=next_logits,
        prompt=ops.convert_to_tensor(np.full((1, length), 1, "int32")),
        cache={"calls": ops.zeros(1, dtype="int32")},
        index=1,
        hidden_states=ops.convert_to_tensor(VECTORS[None, :length]),
    )
    return keras.tree.map_structure(ops.convert_to_numpy, result)


def test_beams_equal_keras_hub():
    arguments = {"num_beams": 3, "return_all_beams": True}
    tokens, scores = one_row(samplers.BeamSampler(**arguments))
    their_tokens, their_scores = one_row(keras_hub.samplers.BeamSampler(**arguments))
    np.testing.assert_array_equal(tokens, their_tokens)
    np.testing.assert_allclose(scores, their_scores, rtol=1e-5)
    np.testing.assert_array_equal(one_row(samplers.BeamSampler(num_beams=3)), tokens[:, 0])


def test_contrastive_search_equals_keras_hub():
    arguments = {"k": 4, "alpha": 0.5}
    ours = one_row(samplers.ContrastiveSampler(**arguments))
    theirs = one_row(keras_hub.samplers.ContrastiveSampler(**arguments))
    np.testing.assert_array_equal(ours, theirs)


def test_random_sampling_follows_the_distribution():
    def uniform(prompt, cache, index):
        return ops.zeros((4, 3)), ops.zeros((4, 1)), cache

    prompt = ops.zeros((4, 300), dtype="int32")
    tokens = samplers.RandomSampler(seed=1)(next=uniform, prompt=prompt)
    counts = np.bincount(ops.convert_to_numpy(tokens).ravel(), minlength=3) / 1200
    np.testing.assert_allclose(counts, 1 / 3, atol=0.05)
    assert len(np.unique(ops.convert_to_numpy(tokens), axis=0)) == 4  # each row has its own noise


def test_finished_rows_keep_their_tokens():
    tokens = decode(samplers.GreedySampler())
    stop = int(tokens[0, 4])
    stopped = decode(samplers.GreedySampler(), stop_token_ids=[stop])
    assert stopped[0, :5].tolist() == tokens[0, :5].tolist()
    assert stopped[0, 5:].tolist() == [11] * (LENGTH - 5)


def test_custom_sampler():
    class Second(samplers.Sampler):
        def get_next_token(self, probabilities):
            return ops.top_k(probabilities, 2)[1][:, 1]

    class TheirSecond(keras_hub.samplers.Sampler):
        def get_next_token(self, probabilities):
            return ops.top_k(probabilities, 2)[1][:, 1]

    np.testing.assert_array_equal(decode(Second()), decode(TheirSecond()))


def test_contrastive_search_needs_hidden_states():
    with pytest.raises(ValueError, match="`hidden_states` must be the hidden states"):
        samplers.ContrastiveSampler()(next=next_logits, prompt=ops.zeros((1, 4), dtype="int32"))
