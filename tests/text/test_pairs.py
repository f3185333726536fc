"""Prompts and responses as training data. KerasHub's preprocessor of Gemma 3 is the judge."""

import keras_hub
import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2

from keras_gemma import GemmaCausalLMPreprocessor, GemmaTokenizer
from tests.models import make_lm

PAIRS = {"prompts": ["To be, or not", "To die"], "responses": [" to be", ": to sleep, no more"]}


@pytest.fixture(scope="module")
def preprocessor(tiny_proto):
    return GemmaCausalLMPreprocessor(GemmaTokenizer(tiny_proto), 32)


def theirs(tiny_proto, length):
    proto = sentencepiece_model_pb2.ModelProto.FromString(tiny_proto)
    for name in ("<start_of_image>", "<end_of_image>", "<img>"):  # which theirs requires
        proto.pieces.add(piece=name, type=proto.SentencePiece.CONTROL)
    tokenizer = keras_hub.models.Gemma3Tokenizer(proto=proto.SerializeToString())
    return keras_hub.models.Gemma3CausalLMPreprocessor(
        tokenizer, sequence_length=length, image_converter=None
    )


def test_rows_equal_keras_hub(preprocessor, tiny_proto):
    x, y, weights = preprocessor(PAIRS)
    their_x, their_y, their_weights = theirs(tiny_proto, 32)(PAIRS)
    for name in ("token_ids", "padding_mask"):
        np.testing.assert_array_equal(x[name], np.array(their_x[name]))
    np.testing.assert_array_equal(y, np.array(their_y))
    np.testing.assert_array_equal(weights, np.array(their_weights))


def test_only_the_response_is_learned(preprocessor):
    x, y, weights = preprocessor({"prompts": "To be,", "responses": " or not"})
    learned = y[weights]
    assert preprocessor.tokenizer.detokenize(learned[:-1]) == " or not"
    assert learned[-1] == preprocessor.tokenizer.end_token_id
    text = preprocessor.tokenizer.detokenize(x["token_ids"][x["padding_mask"]][1:-1])
    assert text == "To be, or not"


def test_long_pairs_keep_half_of_the_response(preprocessor):
    x, y, weights = preprocessor({"prompts": ["to be " * 50], "responses": [" or not" * 50]})
    assert x["padding_mask"].all()
    assert weights.sum() == 17  # half of 32, and <eos>
    assert y[0, -1] == preprocessor.tokenizer.end_token_id


def test_fit_takes_dicts_datasets_and_generators(tiny_proto):
    import tensorflow as tf

    lm = make_lm(proto=tiny_proto)
    batches = tf.data.Dataset.from_tensor_slices(PAIRS).batch(2)
    losses = [
        lm.evaluate(data, verbose=0)[0] for data in (PAIRS, batches, batches.map(lm.preprocessor))
    ]
    losses.append(lm.evaluate(iter([PAIRS] * 2), steps=1, verbose=0)[0])
    assert losses[0] > 0
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
    whole = [p + r for p, r in zip(PAIRS["prompts"], PAIRS["responses"], strict=True)]
    assert lm.evaluate(whole, verbose=0)[0] > losses[0]  # prompts are counted too
    lm.fit(PAIRS, batch_size=2, verbose=0)
    texts = lm.generate(PAIRS["prompts"], max_new_tokens=3)
    assert lm.generate({"prompts": PAIRS["prompts"]}, max_new_tokens=3) == texts


def test_tokenizer_in_a_dataset_makes_ragged_batches(tiny_proto):
    import tensorflow as tf

    tokenizer = GemmaTokenizer(tiny_proto)
    (batch,) = tf.data.Dataset.from_tensor_slices(PAIRS["prompts"]).batch(2).map(tokenizer)
    assert isinstance(batch, tf.RaggedTensor)
    assert batch.to_list() == [ids.tolist() for ids in tokenizer(PAIRS["prompts"])]


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        ({"prompts": ["a", "b"], "responses": ["c"]}, "2 prompts and 1 responses"),
        ({"prompts": ["a"], "responses": ["b"], "images": [0]}, "read text only. Received: 'image"),
    ],
)
def test_invalid_pairs(preprocessor, pairs, says):
    with pytest.raises(ValueError, match=says):
        preprocessor(pairs)
