"""Datasets: formats, files, tokens compared with the published template, packing, errors."""

import json
import re

import jinja2
import keras
import numpy as np
import pytest

from keras_gemma.text.chat_template import CHAT_TEMPLATE
from keras_gemma.training import ChatDataset, ChatStream, chat_dataset
from tests.models import make_lm

HELLO = {"messages": [{"role": "user", "content": " Who? "}, {"role": "assistant", "content": "I"}]}
LONG = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "To be, or not to be,\n<end_of_turn> that is"},
        {"role": "assistant", "content": "the question"},
        {"role": "user", "content": "whether"},
        {"role": "model", "content": "'tis nobler "},
    ]
}
SAMPLES = [
    HELLO,
    LONG,
    {"prompt": "to sleep", "completion": "to die"},
    {"instruction": "No more", "context": "", "response": "and by a sleep"},
    {"text": "To die: to sleep; no more"},
    "the heart-ache",
]


def only(source, tokenizer, **settings):
    """Returns ids, labels and weights of the only row of a dataset, without padding."""
    settings = {"sequence_length": 128, **settings}
    ((x, y, weights),) = chat_dataset(source, tokenizer, **settings)
    used = x["padding_mask"][0] > 0
    return x["token_ids"][0][used], y[0][used], weights[0][used]


@pytest.mark.parametrize("sample", [HELLO, LONG], ids=["hello", "long"])
def test_ids_match_the_published_template(sample, tokenizer):
    """Renders with Jinja and splits at the control tokens that the template itself writes."""
    marks = {"<bos>": "\x01", "<start_of_turn>": "\x02", "<end_of_turn>": "\x03"}
    template = CHAT_TEMPLATE
    for name, mark in marks.items():
        template = template.replace(name, mark)
    rendered = jinja2.Template(template).render(bos_token="\x01", **sample)
    expected = []
    for part in filter(None, re.split("([\x01\x02\x03])", rendered)):
        name = next((name for name, mark in marks.items() if mark == part), None)
        expected += [tokenizer.token_to_id(name)] if name else tokenizer.encode([part], False)[0]
    ids, labels, _ = only([sample], tokenizer)
    assert [*ids, labels[-1]] == expected
    assert list(ids).count(tokenizer.start_token_id) == 1
    np.testing.assert_array_equal(ids[1:], labels[:-1])


def test_learned_tokens(tokenizer):
    _, labels, weights = only([LONG], tokenizer)
    end, (newline,) = tokenizer.end_of_turn_token_id, tokenizer.encode(["\n"])
    runs = np.split(labels, np.flatnonzero(np.diff(weights)) + 1)[1::2]
    assert [tokenizer.detokenize(run[:-1]) for run in runs] == ["the question", "'tis nobler"]
    assert all(run[-1] == end for run in runs)
    assert labels[-1] == newline[0] and weights[-1] == 0
    _, _, weights = only([LONG], tokenizer, loss_on="all")
    assert weights.all()


def test_all_tokens_of_plain_text_are_learned(tokenizer):
    ids, labels, weights = only(["the heart-ache"], tokenizer)
    assert ids[0] == tokenizer.start_token_id and labels[-1] == tokenizer.end_token_id
    assert tokenizer.detokenize(labels) == "the heart-ache" and weights.all()


@pytest.mark.parametrize(
    ("sample", "question", "answer"),
    [
        ({"prompt": "a b", "completion": "c"}, "a b", "c"),
        ({"prompt": [{"role": "user", "content": "a b"}],
          "completion": [{"role": "assistant", "content": "c"}]}, "a b", "c"),
        ({"instruction": "a", "context": "b", "response": "c", "category": "qa"}, "a\n\nb", "c"),
        ({"instruction": "a", "input": "", "output": "c"}, "a", "c"),
    ],
)  # fmt: skip
def test_formats(sample, question, answer, tokenizer):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    expected = only([{"messages": turns}], tokenizer)
    for array, expected_array in zip(only([sample], tokenizer), expected, strict=True):
        np.testing.assert_array_equal(array, expected_array)


def documents_in(data):
    """Returns every document of one pass as ids, labels and weights."""
    documents = []
    for x, y, weights in data:
        for ids, mask, labels, learned in zip(*x.values(), y, weights, strict=True):
            for number in range(1, mask.max() + 1):
                inside = mask == number
                documents.append((*ids[inside], -1, *labels[inside], -1, *learned[inside]))
    return documents


@pytest.mark.parametrize("length", [80, 128])
def test_packing_keeps_every_document(length, tokenizer):
    packed = chat_dataset(SAMPLES * 5, tokenizer, length, batch_size=2)
    alone = chat_dataset(SAMPLES * 5, tokenizer, length, packing=False, shuffle=False)
    assert sorted(documents_in(packed)) == sorted(documents_in(alone))
    assert len(alone) == 30 and len(packed) < 12
    for x, y, weights in packed:
        for array in (*x.values(), y, weights):
            assert array.shape == (2, length)
        assert not weights[x["padding_mask"] == 0].any()
        steps = np.diff(x["padding_mask"], axis=1)
        assert ((steps == 0) | (steps == 1) | (x["padding_mask"][:, 1:] == 0)).all()


def test_packed_loss_is_unpacked_loss(tokenizer):
    """The sliding window is shorter than a document."""
    lm = make_lm("gemma2_grouped")
    losses = {}
    for packing in (False, True):
        data = chat_dataset(SAMPLES, tokenizer, 80, packing, batch_size=len(SAMPLES))
        ((x, y, weights),) = data
        assert (x["padding_mask"].max() > 1) == packing
        logits = lm.predict_on_batch(x)
        every = keras.ops.convert_to_numpy(
            keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)
        )
        losses[packing] = np.sort(every[weights > 0])
    np.testing.assert_allclose(losses[True], losses[False], rtol=1e-4)


def test_each_epoch_has_another_order(tokenizer):
    first, second = (chat_dataset(SAMPLES, tokenizer, 80, packing=False) for _ in range(2))
    before = documents_in(first)
    assert before == documents_in(second) == documents_in(first)
    first.on_epoch_end()
    assert documents_in(first) != before and sorted(documents_in(first)) == sorted(before)
    still = chat_dataset(SAMPLES, tokenizer, 80, packing=False, shuffle=False)
    still.on_epoch_end()
    assert documents_in(still)[0] == documents_in(chat_dataset([HELLO], tokenizer, 80))[0]


def test_file_iterable_and_function(tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_text("\n\n".join(map(json.dumps, SAMPLES)) + "\n", encoding="utf-8")
    expected = documents_in(chat_dataset(SAMPLES, tokenizer, 80, shuffle=False))
    data = chat_dataset(path, tokenizer, 80, shuffle=False)
    assert isinstance(data, ChatDataset) and documents_in(data) == expected

    class Again:
        def __iter__(self):
            return iter(SAMPLES)

    for source in (Again(), lambda: iter(SAMPLES)):
        stream = chat_dataset(source, tokenizer, 80)
        assert isinstance(stream, ChatStream)
        assert documents_in(stream) == expected == documents_in(stream)
        assert stream.counts.samples == 12


def wrapped(data, kind):
    if kind == "loader":
        torch = pytest.importorskip("torch")
        return torch.utils.data.DataLoader(data, batch_size=None)
    if kind == "grain":
        grain = pytest.importorskip("grain")
        return grain.MapDataset.source(data)
    tf = pytest.importorskip("tensorflow")
    x, y, weights = (keras.tree.map_structure(tf.type_spec_from_value, part) for part in data[0])
    return tf.data.Dataset.from_generator(lambda: data, output_signature=(x, y, weights)).apply(
        tf.data.experimental.assert_cardinality(len(data))
    )


@pytest.mark.parametrize("kind", ["plain", "stream", "loader", "grain", "tf_data"])
def test_fit(kind, tokenizer, tiny_proto):
    lm = make_lm(proto=tiny_proto)
    lm.compile(optimizer=keras.optimizers.Adam(1e-2))
    data = chat_dataset(SAMPLES, tokenizer, 80, batch_size=2)
    expected = lm.evaluate(data, return_dict=True, verbose=0)["loss"]
    settings = {"epochs": 3, "verbose": 0}
    if kind == "stream":
        batches = chat_dataset(lambda: iter(SAMPLES), tokenizer, 80, batch_size=2)
        settings |= {"steps_per_epoch": 2}
    else:
        batches = data if kind == "plain" else wrapped(data, kind)
        loss = lm.evaluate(batches, return_dict=True, verbose=0)["loss"]
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    losses = lm.fit(batches, **settings).history["loss"]
    assert losses[2] < losses[0]
    if kind == "plain":
        assert data.epoch >= 3


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"text": "a"', r"invalid JSON: .* at column \d+"),
        (b'"\xff"', "invalid UTF-8: invalid start byte at byte 1"),
        (b"3", "must be an object or a string, not int"),
        (b'{"question": "a"}', r"unknown format with keys \['question'\]; use messages"),
        (b'{"text": " "}', "'text' is empty"),
        (b'{"text": 3}', "'text' must be a string, not int"),
        (b'{"instruction": "a"}', "needs a 'response'"),
        (b'{"prompt": "a", "completion": ["b"]}', "two strings or two lists"),
        (b'{"messages": "a"}', "`messages` must be a list"),
        (b'{"messages": [{"role": "user"}]}', "Message 0 has no content"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "needs a user turn and a model turn"),
        (b'{"instruction": "a", "output": 3}', "content of a message must be a string"),
        (b'{"prompt": "a", "completion": " "}', "message 1, of the role 'model', is empty"),
        (b'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
         "Message 1 must have the role 'assistant'"),
        (b'{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}',
         "a reply must have the role 'assistant' or 'model', not 'system'"),
        (b'{"text": "' + b"to be " * 200 + b'"}', r"tokens do not fit, because sequence_length=80"),
    ],
)  # fmt: skip
def test_bad_samples(bad, reason, tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'"the slings"\n' + bad + b'\n"and arrows"\n')
    with pytest.raises(ValueError, match=rf"data.jsonl, line 2: .*{reason}"):
        chat_dataset(path, tokenizer, 80)
    data = chat_dataset(path, tokenizer, 80, skip_bad=True)
    assert (data.counts.samples, data.counts.bad) == (2, 1)
    assert re.match(f"data.jsonl, line 2: .*{reason}", data.counts.reasons[0])
    assert "1 bad, skipped" in data.describe()


def test_truncation_is_counted(tokenizer):
    data = chat_dataset(["to be " * 200, "or not"], tokenizer, 80, truncate=True)
    assert (data.counts.samples, data.counts.truncated) == (2, 1)
    assert "1 truncated" in data.describe()
    far = {"prompt": "to be " * 200, "completion": "or not"}
    with pytest.raises(ValueError, match="has no token to learn"):
        chat_dataset([far], tokenizer, 80, truncate=True)


@pytest.mark.parametrize(
    ("source", "settings", "error", "message"),
    [
        ([], {}, ValueError, "has no usable sample"),
        ([3], {"skip_bad": True}, ValueError, "All 1 are bad; the first: sample 0: a sample must"),
        (iter(["a"]), {}, TypeError, "every epoch reads it again"),
        (3, {}, TypeError, "every epoch reads it again"),
        ("nowhere.jsonl", {}, FileNotFoundError, "file of samples 'nowhere.jsonl' does not exist"),
        (["a"], {"loss_on": "user"}, ValueError, "loss_on='user'"),
        (["a"], {"sequence_length": 0}, ValueError, "sequence_length=0"),
        (["a"], {"batch_size": 1.5}, ValueError, "batch_size=1.5"),
    ],
)
def test_bad_arguments(source, settings, error, message, tokenizer):
    with pytest.raises(error, match=message):
        chat_dataset(source, tokenizer, **settings)


def test_empty_stream(tokenizer):
    with pytest.raises(ValueError, match="has no usable sample"):
        list(chat_dataset(lambda: iter([]), tokenizer))


def test_no_tokenizer():
    with pytest.raises(TypeError, match="must be a GemmaTokenizer"):
        chat_dataset(["a"], "gemma_tiny_en")


def test_rows_fit_the_samples(tokenizer):
    """A few samples are not packed into one row; many samples share rows."""
    few = [{"prompt": f"to be {i}", "completion": "or not"} for i in range(20)]
    data = chat_dataset(few, tokenizer)
    longest = max(len(document.inputs) for row in data.rows for document in row)
    assert len(data.rows) == 20 and longest <= data.shape.length < longest + 16
    many = chat_dataset(few * 200, tokenizer)
    assert 64 <= len(many.rows) < 100 and many.shape.length > 5 * longest
    assert chat_dataset(few * 200, tokenizer, max_sequence_length=64).shape.length == 64
    alone = chat_dataset(few * 200, tokenizer, packing=False)
    assert longest <= alone.shape.length < longest + 16  # no padding that packing would fill
    assert chat_dataset(lambda: iter(few), tokenizer).shape.length == 1024
    with pytest.raises(ValueError, match="sequence_length=8 allows 9"):
        chat_dataset(few, tokenizer, max_sequence_length=8)
    with pytest.raises(ValueError, match="`max_sequence_length` must be a positive integer"):
        chat_dataset(few, tokenizer, max_sequence_length=0)
