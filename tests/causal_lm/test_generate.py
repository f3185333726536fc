"""Inputs, outputs and errors of `generate`."""

import threading

import numpy as np
import pytest
from keras import ops

from keras_gemma import samplers
from tests.models import compile_lm, make_lm

TEXTS = ["To be, or", "the slings and arrows of"]


@pytest.fixture(scope="module")
def expected(lm):
    texts = lm.generate(TEXTS)
    assert all(text.startswith(prompt) for text, prompt in zip(texts, TEXTS, strict=True))
    assert texts[0] != TEXTS[0] and texts[1] != TEXTS[1]
    return texts


@pytest.fixture(scope="module")
def bare():
    """Model without a preprocessor."""
    return make_lm()


def test_a_string(lm, expected):
    assert lm.generate(TEXTS[0]) == expected[0]
    assert lm.generate(TEXTS[1].encode()) == expected[1]
    assert lm.generate(np.str_(TEXTS[1])) == expected[1]


@pytest.mark.parametrize(
    "wrap",
    [tuple, np.array, lambda texts: np.array(texts, dtype=object)],
    ids=["tuple", "array", "array of objects"],
)
def test_strings(lm, expected, wrap):
    result = lm.generate(wrap(TEXTS))
    assert result == expected
    assert type(result) is list and all(type(text) is str for text in result)


def test_strip_prompt(lm, expected):
    stripped = lm.generate(TEXTS, strip_prompt=True)
    for text, prompt, rest in zip(expected, TEXTS, stripped, strict=True):
        assert prompt + rest == text
    (row,) = lm.generate([[2, 300, 301]], max_new_tokens=4, stop_token_ids=None)
    rest = lm.generate([[2, 300, 301]], max_new_tokens=4, stop_token_ids=None, strip_prompt=True)
    assert rest == [row[3:]]


def test_an_empty_string(lm):
    assert type(lm.generate("", max_new_tokens=4)) is str


def test_ragged_ids(lm, bare, expected):
    rows = [ids.tolist() for ids in lm.preprocessor.tokenize_prompts(TEXTS)]
    assert len(rows[0]) != len(rows[1])
    result = lm.generate(rows)
    assert type(result[0]) is list and type(result[0][0]) is int
    assert lm.preprocessor.tokenizer.detokenize(result) == expected
    assert bare.generate(rows, max_length=32, stop_token_ids=[1, 107]) == result
    arrays = [np.array(row) for row in rows]
    assert bare.generate(arrays, max_length=32, stop_token_ids=[1, 107]) == result
    square = np.array([[2, 5, 9], [2, 7, 8]])
    assert bare.generate(square, max_new_tokens=3, stop_token_ids=None) == bare.generate(
        square.tolist(), max_new_tokens=3, stop_token_ids=None
    )


def test_a_dict_of_arrays(lm, bare, expected):
    inputs = lm.preprocessor.generate_preprocess(TEXTS)
    kept = {key: np.array(value) for key, value in inputs.items()}
    for model, arguments in ((lm, {}), (bare, {"stop_token_ids": [1, 107]})):
        result = model.generate(inputs, **arguments)
        assert set(result) == {"token_ids", "padding_mask"}
        assert result["token_ids"].shape == (2, 32) and result["token_ids"].dtype == "int32"
        assert result["padding_mask"].dtype == "bool"
        assert lm.preprocessor.generate_postprocess(result) == expected
        assert not result["token_ids"][~result["padding_mask"]].any()
    for key in kept:
        np.testing.assert_array_equal(inputs[key], kept[key])
    stripped = lm.generate(inputs, strip_prompt=True)
    rest = lm.generate(TEXTS, strip_prompt=True)
    assert lm.preprocessor.generate_postprocess(stripped) == rest


def test_data_sets(lm, expected):
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices(TEXTS)
    assert lm.generate(dataset.batch(2)) == expected
    assert lm.generate(dataset.batch(1)) == expected
    assert lm.generate(dataset) == expected
    inputs = lm.preprocessor.generate_preprocess(TEXTS)
    result = lm.generate(tf.data.Dataset.from_tensor_slices(inputs).batch(1))
    assert lm.preprocessor.generate_postprocess(result) == expected
    with pytest.raises(ValueError, match="dataset of prompts is empty"):
        lm.generate(dataset.take(0))


def test_compile_names_the_sampler(lm, expected):
    compile_lm(lm, sampler="top_k")
    assert lm.sampler == samplers.TopKSampler()
    first = lm.generate(TEXTS, seed=1)
    assert first == lm.generate(TEXTS, seed=1) != expected
    compile_lm(lm)
    assert lm.sampler == samplers.GreedySampler()
    assert lm.generate(TEXTS) == expected
    with pytest.raises(ValueError, match="'min_p', 'random', 'top_k', 'top_p'"):
        lm.compile(sampler="best")
    assert lm.generate(TEXTS) == expected


def test_two_threads_generate_the_same_texts(lm, expected):
    results = {}

    def work(i):
        results[i] = [lm.generate(TEXTS[i]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [expected[i]] * 3 for i in range(2)}


def test_bad_prompts(lm, bare):
    def refuses(says, *args, model=lm, **kwargs):
        with pytest.raises(ValueError, match=says):
            model.generate(*args, **kwargs)

    refuses(r"Prompt 0 has \d+ tokens, which leaves no room .*max_length=5", TEXTS, max_length=5)
    refuses("no room .*max_length=32", "To be " * 40)
    refuses("context length is 8192", "to be " * 9000, max_new_tokens=4)
    for empty in ([], (), np.array([], dtype=object)):
        refuses("prompt to continue|at least one prompt", empty)
    refuses("Prompt 1 has no tokens", [[2], []])
    refuses(r"inputs\[0\]` must be in \[0, 511\].*from 2 to 512", [[2, 512]])
    refuses("from -1 to -1", [[2], [-1]])
    refuses("list of lists of ids", [2, 5, 9])
    refuses("inputs.0.` must be integer ids of shape .tokens.", [[[2, 5, 9]]])
    refuses("must be 'auto', None, or token ids.*'eos'", TEXTS, stop_token_ids="eos")
    refuses(
        "which text requires. Pass token ids",
        TEXTS,
        model=bare,
        stop_token_ids=None,
    )
    refuses("no preprocessor, which .* Pass `stop_token_ids`", [[2]], model=bare, max_new_tokens=3)
    refuses("`max_length` or `max_new_tokens`", [[2]], model=bare, stop_token_ids=None)
    with pytest.raises(TypeError, match="Text must be a string"):
        lm.generate(["To be", 3])


def test_bad_dicts(bare):
    ids, mask = np.array([[2, 5, 9, 0, 0]]), np.array([[1, 1, 1, 0, 0]])

    def refuses(says, inputs):
        with pytest.raises(ValueError, match=says):
            bare.generate(inputs, stop_token_ids=None)

    refuses(r"Missing: \['padding_mask'\]", {"token_ids": ids})
    refuses(r"\(1, 5\) and \(1, 4\)", {"token_ids": ids, "padding_mask": mask[:, :4]})
    refuses(
        r"\[batch, tokens\]. Received: shape \(5,\)", {"token_ids": ids[0], "padding_mask": mask[0]}
    )
    refuses("after the prompt", {"token_ids": ids, "padding_mask": mask[:, ::-1]})
    refuses("Rows .0. have no room", {"token_ids": ids, "padding_mask": np.ones_like(mask)})
    refuses("Prompt 0 has no tokens", {"token_ids": ids, "padding_mask": np.zeros_like(mask)})
    refuses("ids from 507 to 516", {"token_ids": ids + 507, "padding_mask": mask})


def test_tokenizer_larger_than_the_backbone_vocabulary(tiny_proto):
    from keras_gemma import GemmaBackbone, GemmaCausalLM
    from tests.configurations import GEMMA1

    preprocessor = make_lm(proto=tiny_proto).preprocessor
    with pytest.raises(ValueError, match="512 ids, but the backbone's vocabulary_size is 500"):
        GemmaCausalLM(GemmaBackbone(**GEMMA1 | {"vocabulary_size": 500}), preprocessor)


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_half_precision(dtype, tiny_proto):
    lm = make_lm("gemma2_grouped", tiny_proto, dtype)
    stored = {weight.dtype for weight in lm.backbone.named_weights().values()}
    assert stored == {"bfloat16" if dtype == "bfloat16" else "float32"}
    texts = lm.generate(TEXTS, max_new_tokens=8)
    assert all(text.startswith(prompt) for text, prompt in zip(texts, TEXTS, strict=True))
    assert lm.generate(TEXTS, max_new_tokens=8) == texts


def test_generate_functions_of_keras_hub(lm):
    ids = np.array([[2, 300, 301, 0, 0, 0], [2, 300, 301, 302, 0, 0]])
    batch = {"token_ids": ids, "padding_mask": ids > 0}
    expected = lm.generate(batch, stop_token_ids=None)
    lm.generate_function = None  # KerasHub's way to compile again
    made = lm.make_generate_function()
    for function in (lm.generate_step, lm.generate_function, made):
        result = function(batch)
        np.testing.assert_array_equal(result["token_ids"], expected["token_ids"])
        assert result["padding_mask"].all()
    stopped = lm.generate_step(batch, stop_token_ids=(int(expected["token_ids"][0, 3]),))
    assert not stopped["padding_mask"][0].all()
    with pytest.raises(ValueError, match="`generate_function` cannot be replaced"):
        lm.generate_function = print


@pytest.mark.parametrize("configuration", ["gemma2_grouped", "gemma3"])
def test_call_with_cache(configuration):
    """A prompt, padded as in KerasHub, and two steps equal the whole text, beyond the window."""
    lm = make_lm(configuration)
    config = lm.backbone.config
    ids = np.random.default_rng(0).integers(3, 400, (2, 9))
    expected = lm.predict_on_batch({"token_ids": ids, "padding_mask": np.ones_like(ids)})
    shape = (2, config.num_layers, 2, 12, config.num_key_value_heads, config.head_dim)
    prompt = np.pad(ids[:, :7], [(0, 0), (0, 5)])
    cache = np.zeros(shape, "float32")
    logits, hidden, cache = lm.call_with_cache(prompt, ops.convert_to_tensor(cache), 0)
    assert hidden.shape == (2, 12, config.hidden_dim) and tuple(cache.shape) == shape
    compare = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(ops.convert_to_numpy(logits)[:, :7], expected[:, :7], **compare)
    for i in (7, 8):
        logits, _, cache = lm.call_with_cache(ids[:, i : i + 1], cache, i)
        np.testing.assert_allclose(ops.convert_to_numpy(logits)[:, 0], expected[:, i], **compare)
