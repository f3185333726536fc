import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf

from keras_gemma.text import GemmaCausalLMPreprocessor, GemmaPreprocessor, GemmaTokenizer
from tests.text.texts import TEXTS

PROMPT = "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"


@pytest.fixture
def preprocessor(tokenizer):
    return GemmaCausalLMPreprocessor(tokenizer, sequence_length=8)


def lists(tree):
    return keras.tree.map_structure(lambda x: np.asarray(x).tolist(), tree)


# Training.


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("length", [1, 2, 8, 60])
def test_training_rows_equal_kerashub(proto, tokenizer, start, end, length):
    options = {"sequence_length": length, "add_start_token": start, "add_end_token": end}
    ours = GemmaCausalLMPreprocessor(tokenizer, **options)
    theirs = keras_hub.models.GemmaCausalLMPreprocessor(
        keras_hub.models.GemmaTokenizer(proto), **options
    )
    assert lists(ours(TEXTS)) == lists(theirs(TEXTS))
    for text in TEXTS:
        assert lists(ours(text)) == lists(theirs(text))
    assert lists(ours(TEXTS, sequence_length=5)) == lists(theirs(TEXTS, sequence_length=5))


def test_training_rows(tokenizer, preprocessor):
    ids = tokenizer("The fox").tolist()
    x, y, weight = preprocessor(["The fox", "The quick brown fox jumps over the dog"])
    assert x["token_ids"].dtype == y.dtype == np.int32
    assert x["padding_mask"].dtype == weight.dtype == np.bool_
    assert x["token_ids"].shape == x["padding_mask"].shape == y.shape == weight.shape == (2, 8)
    row = [2, *ids, 1]
    assert x["token_ids"][0].tolist() == (row + [0] * 9)[:8]
    assert y[0].tolist() == (row + [0] * 9)[1:9]
    assert weight[0].tolist() == ([True] * len(row) + [False] * 9)[1:9]
    assert y[1, -1] == 1  # truncated texts end with <eos>
    assert weight[1].all()
    assert preprocessor("The fox")[1].tolist() == y[0].tolist()


def test_labels_are_refused(preprocessor):
    with pytest.raises(ValueError, match="leave `y` and `sample_weight` out"):
        preprocessor(["fox"], [1])


def test_backbone_rows(tokenizer):
    preprocessor = GemmaPreprocessor(tokenizer, sequence_length=6)
    x = preprocessor(["fox", "The quick brown fox jumps"])
    ids = tokenizer("fox").tolist()
    assert x["token_ids"][0].tolist() == ([2, *ids, 1] + [0] * 6)[:6]
    assert x["token_ids"][1].tolist() == [2, *tokenizer("The quick brown fox jumps")[:4], 1]
    assert x["padding_mask"].dtype == np.bool_
    assert preprocessor("fox")["token_ids"].shape == (6,)
    labels = np.array([0, 1])
    assert preprocessor(["fox", "a"], labels)[1] is labels
    assert len(preprocessor(["fox", "a"], labels, labels)) == 3


def test_options_of_the_tokenizer_are_ignored(proto, tokenizer):
    other = GemmaTokenizer(proto, sequence_length=3, add_bos=True, add_eos=True)
    for text in TEXTS:
        assert lists(GemmaPreprocessor(other, 16)(text)) == lists(
            GemmaPreprocessor(tokenizer, 16)(text)
        )


# Prompts.


@pytest.mark.parametrize("start", [True, False])
def test_prompts_equal_kerashub(proto, tokenizer, start):
    ours = GemmaCausalLMPreprocessor(tokenizer, 60, add_start_token=start)
    theirs = keras_hub.models.GemmaCausalLMPreprocessor(keras_hub.models.GemmaTokenizer(proto), 60)
    texts = [text for text in TEXTS if text]
    packed = ours.generate_preprocess(texts)
    if start:  # KerasHub always adds the start token
        assert lists(packed) == lists(theirs.generate_preprocess(texts))
        assert ours.generate_postprocess(packed) == theirs.generate_postprocess(packed)
        one = ours.generate_preprocess(texts[0], sequence_length=40)
        assert lists(one) == lists(theirs.generate_preprocess(texts[0], sequence_length=40))
    assert (packed["token_ids"][:, 0] == 2).all() == start
    assert ours.generate_postprocess(packed) == texts


@pytest.mark.parametrize("text", [PROMPT, PROMPT.removeprefix("<bos>")])
def test_exactly_one_start_token(tokenizer, preprocessor, text):
    expected = [2, *tokenizer(PROMPT.removeprefix("<bos>")).tolist()]
    assert expected[:2] == [2, 106]
    assert preprocessor.tokenize_prompts([text])[0].tolist() == expected
    packed = preprocessor.generate_preprocess(text, sequence_length=40)
    assert packed["token_ids"][packed["padding_mask"]].tolist() == expected
    x, _, _ = preprocessor(text, sequence_length=40)
    assert x["token_ids"][x["padding_mask"]].tolist() == [*expected, 1]


def test_rendered_templates_keep_their_start_token(tokenizer):
    preprocessor = GemmaCausalLMPreprocessor(tokenizer, add_start_token=False)
    rendered, plain = preprocessor.tokenize_prompts([PROMPT, "fox"])
    assert rendered[:2].tolist() == [2, 106]
    assert plain.tolist() == tokenizer("fox").tolist()


def test_control_tokens_in_prompts_and_training_data(tokenizer, preprocessor):
    text = "<start_of_turn>user\nfox<end_of_turn>\n"
    ids = [106, *tokenizer("user\nfox").tolist(), 107, 108]
    assert preprocessor.tokenize_prompts([text])[0].tolist() == [2, *ids]
    packed = preprocessor.generate_preprocess(text, sequence_length=30)
    assert packed["token_ids"][packed["padding_mask"]].tolist() == [2, *ids]
    for whole in (text, f"<bos>{text}", f"{text}<eos>", f"<bos>{text}<eos>"):
        x, y, weight = preprocessor(whole, sequence_length=30)
        assert x["token_ids"][x["padding_mask"]].tolist() == [2, *ids, 1]
        assert y[weight].tolist() == [*ids, 1]
    cut = preprocessor(f"{text}<eos>", sequence_length=4)[1]
    assert cut.tolist() == [*ids[:3], 1]


def test_start_and_end_tokens_in_a_text_are_kept(tokenizer):
    preprocessor = GemmaPreprocessor(tokenizer, 12, add_start_token=False, add_end_token=False)
    x = preprocessor(["<bos>fox<eos>", "fox"])
    fox = tokenizer("fox").tolist()
    assert x["token_ids"][0][x["padding_mask"][0]].tolist() == [2, *fox, 1]
    assert x["token_ids"][1][x["padding_mask"][1]].tolist() == fox


def test_prompts_are_neither_truncated_nor_padded(tokenizer, preprocessor):
    long = "The quick brown fox " * 20
    rows = preprocessor.tokenize_prompts([long, ""])
    assert rows[0].tolist() == [2, *tokenizer(long).tolist()]
    assert rows[1].tolist() == [2]
    assert all(row.dtype == np.int32 for row in rows)


def test_generate_postprocess(tokenizer, preprocessor):
    ids = np.array([2, *tokenizer("The fox"), 107, 1, 0, 0])
    mask = np.ones_like(ids, "bool")
    assert preprocessor.generate_postprocess({"token_ids": ids, "padding_mask": mask}) == (
        "The fox<end_of_turn>"
    )
    mask[-4:] = False
    tensors = {
        "token_ids": keras.ops.convert_to_tensor(ids[None]),
        "padding_mask": keras.ops.convert_to_tensor(mask[None]),
    }
    assert preprocessor.generate_postprocess(tensors) == ["The fox"]
    integers = {"token_ids": ids.tolist(), "padding_mask": mask.astype(int).tolist()}
    assert preprocessor.generate_postprocess(integers) == "The fox"


# tf.data and fit.


@pytest.mark.parametrize("batched_first", [True, False])
def test_tf_data_maps_the_preprocessor(preprocessor, batched_first):
    texts = TEXTS[:4]
    dataset = tf.data.Dataset.from_tensor_slices(texts)
    if batched_first:
        dataset = dataset.batch(4).map(preprocessor)
    else:
        dataset = dataset.map(preprocessor, num_parallel_calls=2).batch(4)
    ids = tf.TensorSpec((None, 8), tf.int32)
    mask = tf.TensorSpec((None, 8), tf.bool)
    assert dataset.element_spec == ({"token_ids": ids, "padding_mask": mask}, ids, mask)
    assert lists(next(dataset.as_numpy_iterator())) == lists(preprocessor(texts))


def test_tf_data_maps_prompts(preprocessor):
    dataset = tf.data.Dataset.from_tensor_slices(["fox", "a"])
    mapped = dataset.batch(2).map(preprocessor.generate_preprocess)
    assert mapped.element_spec["token_ids"].shape == (None, 8)
    assert lists(next(mapped.as_numpy_iterator())) == lists(
        preprocessor.generate_preprocess(["fox", "a"])
    )


def test_fit_reads_the_rows(preprocessor):
    ids = keras.Input((None,), dtype="int32", name="token_ids")
    mask = keras.Input((None,), dtype="bool", name="padding_mask")
    hidden = keras.layers.Embedding(440, 4)(ids) * keras.ops.cast(mask, "float32")[..., None]
    model = keras.Model({"token_ids": ids, "padding_mask": mask}, keras.layers.Dense(440)(hidden))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    dataset = tf.data.Dataset.from_tensor_slices(TEXTS).map(preprocessor).batch(2)
    assert np.isfinite(model.fit(dataset, shuffle=False, verbose=0).history["loss"][0])
    x, y, weight = preprocessor(TEXTS)
    fitted = model.fit(x, y, sample_weight=weight, verbose=0)
    assert np.isfinite(fitted.history["loss"][0])


# Saving.


@pytest.mark.parametrize("cls", [GemmaPreprocessor, GemmaCausalLMPreprocessor])
def test_config_round_trip(tokenizer, cls):
    preprocessor = cls(tokenizer, 12, add_start_token=False, add_end_token=False, name="rows")
    stored = keras.saving.serialize_keras_object(preprocessor)
    assert stored["registered_name"] == f"keras_gemma>{cls.__name__}"
    again = keras.saving.deserialize_keras_object(stored)
    assert again.get_config() == preprocessor.get_config()
    assert lists(again(TEXTS)) == lists(preprocessor(TEXTS))
    assert cls.tokenizer_cls is GemmaTokenizer


@keras.saving.register_keras_serializable(package="keras_gemma_tests")
class Holder(keras.Model):
    def __init__(self, preprocessor, **kwargs):
        super().__init__(**kwargs)
        self.preprocessor = preprocessor
        self.dense = keras.layers.Dense(1)

    def call(self, x):
        return self.dense(x)

    def get_config(self):
        return {"preprocessor": keras.saving.serialize_keras_object(self.preprocessor)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config["preprocessor"]))


def test_keras_saving(tmp_path, preprocessor):
    model = Holder(preprocessor)
    model(np.ones((1, 2)))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert lists(again.preprocessor(TEXTS)) == lists(preprocessor(TEXTS))
    assert len(again.weights) == 2


def test_keras_saving_without_a_vocabulary_in_the_config(tmp_path, preprocessor, monkeypatch):
    config = GemmaTokenizer.get_config
    monkeypatch.setattr(GemmaTokenizer, "get_config", lambda self: config(self) | {"proto": None})
    model = Holder(preprocessor)
    model(np.ones((1, 2)))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert lists(again.preprocessor(TEXTS)) == lists(preprocessor(TEXTS))


def test_sequence_length_can_be_set(preprocessor):
    preprocessor.sequence_length = 5
    assert preprocessor("fox")[1].shape == (5,)
    assert preprocessor.get_config()["sequence_length"] == 5


# Bad input.


def test_a_long_prompt_is_refused(tokenizer, preprocessor):
    text = "The quick brown fox jumps over the dog"
    count = len(tokenizer(text)) + 1
    with pytest.raises(ValueError, match=rf"{count} tokens and sequence_length=8.*max_length"):
        preprocessor.generate_preprocess(["a", text])
    assert preprocessor.generate_preprocess(text, count)["padding_mask"].all()


def test_bad_prompts_are_refused(preprocessor):
    for use in (preprocessor.tokenize_prompts, preprocessor.generate_preprocess):
        with pytest.raises(ValueError, match="at least one prompt"):
            use([])
        with pytest.raises(TypeError, match="must be a string"):
            use([3])
    with pytest.raises(TypeError, match="`prompts` must be a list"):
        preprocessor.tokenize_prompts("fox")


@pytest.mark.parametrize("length", [0, -1, 2.5, None, True])
def test_a_bad_sequence_length_is_refused(tokenizer, preprocessor, length):
    with pytest.raises(ValueError, match="`sequence_length` must be a positive integer"):
        GemmaPreprocessor(tokenizer, length)
    with pytest.raises(ValueError, match="`sequence_length` must be a positive integer"):
        preprocessor.sequence_length = length


def test_other_bad_arguments_are_refused(tokenizer, preprocessor):
    with pytest.raises(TypeError, match="`tokenizer` must be"):
        GemmaPreprocessor("vocabulary.spm")
    with pytest.raises(ValueError, match="leave room"):
        GemmaPreprocessor(tokenizer, 1)("fox")
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        preprocessor.generate_postprocess({"token_ids": [1, 2], "padding_mask": [True]})
    with pytest.raises(ValueError, match="no vocabulary yet"):
        GemmaCausalLMPreprocessor(GemmaTokenizer())("fox")
