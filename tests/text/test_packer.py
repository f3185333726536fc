"""The packer of a preprocessor, compared with KerasHub's."""

import keras_hub
import numpy as np
import pytest
import tensorflow as tf

from keras_gemma.text import GemmaCausalLMPreprocessor

pytestmark = pytest.mark.once

ROWS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], []]


@pytest.fixture
def packers(proto, tokenizer):
    theirs = keras_hub.models.GemmaCausalLMPreprocessor(keras_hub.models.GemmaTokenizer(proto), 6)
    theirs.build(None)
    return GemmaCausalLMPreprocessor(tokenizer, 6).packer, theirs.packer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_end_value": False},
        {"add_start_value": False, "sequence_length": 4},
        {"add_start_value": False, "add_end_value": False, "sequence_length": 9},
    ],
)
def test_packer_equals_kerashub(packers, options):
    ours, theirs = packers
    for inputs in (ROWS, ROWS[0], np.array(ROWS[1]), tf.ragged.constant(ROWS, dtype="int32")):
        (ids, mask), expected = ours(inputs, **options), theirs(inputs, **options)
        assert (ids.dtype, mask.dtype) == ("int32", "bool")
        np.testing.assert_array_equal(ids, expected[0])
        np.testing.assert_array_equal(mask, expected[1])
    for name in ("start_value", "end_value", "pad_value", "sequence_length"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_custom_preprocessing(tokenizer):
    """The packer follows the preprocessor, in an overridden method as in KerasHub."""

    class Preprocessor(GemmaCausalLMPreprocessor):
        def generate_preprocess(self, x, sequence_length=None):
            ids, mask = self.packer(self.tokenizer(x), sequence_length, add_end_value=False)
            return {"token_ids": ids, "padding_mask": mask}

    preprocessor, plain = Preprocessor(tokenizer, 8), GemmaCausalLMPreprocessor(tokenizer, 8)
    for length in (8, 12):
        preprocessor.sequence_length = plain.sequence_length = length
        for inputs in ("The fox", ["The fox", "it"]):
            for name, values in plain.generate_preprocess(inputs).items():
                np.testing.assert_array_equal(
                    preprocessor.generate_preprocess(inputs)[name], values
                )


def test_errors(packers):
    ours, _ = packers
    with pytest.raises(ValueError, match=r"at least 2.*sequence_length=1"):
        ours([5], sequence_length=1)
    with pytest.raises(ValueError, match="map the preprocessor"):
        tf.data.Dataset.from_tensors([5]).map(ours)
    with pytest.raises(ValueError, match="map the preprocessor"):
        tf.data.Dataset.from_tensors(tf.ragged.constant(ROWS)).map(ours)
