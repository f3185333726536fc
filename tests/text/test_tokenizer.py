import copy
import io
import random
from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest
import sentencepiece
import tensorflow as tf
import tensorflow_text
import transformers

from keras_gemma.text import GemmaTokenizer
from tests.text.texts import TEXTS

ROOT = Path(__file__).parents[2]
BUILTIN = ROOT / "presets/gemma_tiny_en/assets/tokenizer/vocabulary.spm"
SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"


def rows(ragged):
    """Returns KerasHub's ids as lists, from arrays or ragged tensors."""
    return ragged.to_list() if hasattr(ragged, "to_list") else [list(map(int, r)) for r in ragged]


# References.


def test_ids_and_texts_equal_sentencepiece(proto, tokenizer):
    reference = sentencepiece.SentencePieceProcessor(model_proto=proto)
    for text in TEXTS:
        ids = tokenizer(text)
        assert ids.dtype == np.int32
        assert ids.tolist() == reference.encode(text)
        assert tokenizer.detokenize(ids) == reference.decode(ids.tolist()) == text
    assert tokenizer.get_vocabulary() == [reference.id_to_piece(i) for i in range(440)]
    assert tokenizer.vocabulary_size() == 440


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("add_eos", [False, True])
def test_ids_equal_tensorflow_text(proto, add_bos, add_eos):
    ours = GemmaTokenizer(proto, add_bos=add_bos, add_eos=add_eos)
    theirs = tensorflow_text.SentencepieceTokenizer(proto, add_bos=add_bos, add_eos=add_eos)
    expected = theirs.tokenize(TEXTS)
    assert [ids.tolist() for ids in ours(TEXTS)] == expected.to_list()
    texts = [text.decode() for text in theirs.detokenize(expected).numpy()]
    assert ours.detokenize(expected) == texts


@pytest.mark.parametrize("options", [{}, {"sequence_length": 6, "add_bos": True, "add_eos": True}])
@pytest.mark.parametrize("python", [True, False])
def test_ids_equal_kerashub(proto, options, python):
    ours = GemmaTokenizer(proto, **options)
    theirs = keras_hub.models.GemmaTokenizer(proto, _allow_python_workflow=python, **options)
    assert rows(ours(TEXTS)) == rows(theirs(TEXTS))
    for text in TEXTS:
        assert ours(text).tolist() == np.asarray(theirs(text)).tolist()
        assert ours.detokenize(ours(text)) == theirs.detokenize(theirs(text))
    assert set(ours.special_tokens) == set(theirs.special_tokens)
    assert set(ours.special_token_ids) == set(theirs.special_token_ids)
    assert ours.get_vocabulary() == theirs.get_vocabulary()
    for name in ("start_token", "end_token", "pad_token"):
        assert getattr(ours, name) == getattr(theirs, name)
        assert getattr(ours, f"{name}_id") == getattr(theirs, f"{name}_id")


@pytest.mark.parametrize(
    "ids", [[2, 3, 1, 0], [119, 400, 3], [115 + 0xE2, 115 + 0x82], [106, 108, 107]]
)
def test_special_and_byte_ids_equal_tensorflow_text(proto, tokenizer, ids):
    expected = tensorflow_text.SentencepieceTokenizer(proto).detokenize(ids).numpy().decode()
    assert tokenizer.detokenize(ids) == expected


def mixed_texts(count=300):
    """Returns random texts of all kinds of pieces, without `▁` and `<bos>`, `<eos>` and `<pad>`."""
    draw = random.Random(0)
    parts = [*" \t\n\r\0<>", "  ", "\n" * 7, "fox", "é", "\u0301", "日本", "😀", "1234"]
    parts += ["<start_of_turn>", "<end_of_turn>", "<unused7>", "<mask>", "<start_of_", "<h1>"]
    return ["".join(draw.choices(parts, k=draw.randrange(15))) for _ in range(count)]


def test_mixed_texts_equal_tensorflow_text_and_kerashub(proto, tokenizer):
    texts = mixed_texts()
    expected = tensorflow_text.SentencepieceTokenizer(proto).tokenize(texts).to_list()
    assert [ids.tolist() for ids in tokenizer(texts)] == expected
    assert rows(keras_hub.models.GemmaTokenizer(proto)(texts)) == expected


def test_ids_equal_transformers(proto, tokenizer, tmp_path):
    """Ids equal transformers' ids, with `<bos>` and other special tokens in the text.

    From a SentencePiece model, transformers does not add runs of spaces as tokens. It splits runs
    above the maximum length, here 4, differently than SentencePiece.
    """
    (tmp_path / "tokenizer.model").write_bytes(proto)
    theirs = transformers.GemmaTokenizer.from_pretrained(tmp_path, add_bos_token=False)
    names = ["<bos>", "<eos>", "<pad>", "<unk>", "<start_of_turn>"]
    for i, text in enumerate(mixed_texts()):
        middle = len(text) // 2
        text = text[:middle] + names[i % 5] + text[middle:]
        while " " * 5 in text:
            text = text.replace(" " * 5, " ")
        assert tokenizer(text).tolist() == theirs.encode(text, add_special_tokens=False), text


def test_ids_of_a_corpus_equal_the_references():
    if not SHAKESPEARE.exists():
        pytest.skip(f"no corpus at {SHAKESPEARE}")
    proto = BUILTIN.read_bytes()
    text = SHAKESPEARE.read_text("utf-8")[:100_000]
    expected = sentencepiece.SentencePieceProcessor(model_proto=proto).encode(text)
    tokenizer = GemmaTokenizer(proto)
    assert tokenizer(text).tolist() == expected
    assert tokenizer.tokenize(text, parse_special=False).tolist() == expected
    assert tensorflow_text.SentencepieceTokenizer(proto).tokenize(text).numpy().tolist() == expected
    assert tokenizer.detokenize(expected) == text


# Control tokens.


def test_parse_special(tokenizer):
    text = "<bos><start_of_turn>user\nfox<end_of_turn><eos><pad>"
    fox = tokenizer("user\nfox").tolist()
    expected = [2, 106, *fox, 107, 1, 0]
    for ids in (tokenizer(text), tokenizer.call(text), tokenizer.tokenize(text)):
        assert ids.tolist() == expected
    assert tokenizer.encode([text]) == [expected]
    plain = tokenizer.tokenize(text, parse_special=False)
    assert plain.tolist() == tokenizer(text, parse_special=False).tolist()
    assert [plain.tolist()] == tokenizer.encode([text], parse_special=False)
    assert plain.min() > 107
    assert tokenizer.detokenize(plain) == text


def test_add_bos_and_add_eos_with_plain_text(proto):
    tokenizer = GemmaTokenizer(proto, sequence_length=12, add_bos=True, add_eos=True)
    ids = tokenizer.tokenize(["<eos>"], parse_special=False)[0].tolist()
    assert ids[0] == 2
    assert ids.index(1) > 3


def test_skip_special_tokens(tokenizer):
    fox = tokenizer("fox").tolist()
    ids = [2, 106, *fox, 107, 1, 3, 0]
    assert tokenizer.detokenize(ids) == "<start_of_turn>fox<end_of_turn> ⁇ "
    assert tokenizer.detokenize(ids, skip_special_tokens=True) == "fox"
    shown = tokenizer.detokenize([ids, fox], skip_special_tokens=False)
    assert shown == ["<bos><start_of_turn>fox<end_of_turn><eos><unk><pad>", "fox"]
    assert tokenizer.detokenize([], skip_special_tokens=False) == ""
    half, other_half = 115 + 0xE2, 115 + 0x82
    assert tokenizer.detokenize([half, 106, other_half], skip_special_tokens=True) == "\ufffd\ufffd"


def test_special_tokens_equal_kerashub(proto, tokenizer):
    theirs = keras_hub.models.GemmaTokenizer(proto)
    ids = [2, 106, *tokenizer("user\nfox").tolist(), 107, 108, 4, 7, 1, 0, 0]
    assert tokenizer.detokenize(ids) == theirs.detokenize(ids)


# Shapes and types.


def test_a_batch_is_a_list_of_arrays_or_one_array(proto, tokenizer):
    ragged = tokenizer(["The fox", "dog"])
    assert [type(ids) for ids in ragged] == [np.ndarray, np.ndarray]
    assert tokenizer([]) == []
    dense = GemmaTokenizer(proto, sequence_length=4)(["The quick brown fox", "a", ""])
    assert dense.shape == (3, 4) and dense.dtype == np.int32
    assert dense[0].tolist() == tokenizer("The quick brown fox")[:4].tolist()
    assert dense[1, 1:].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "texts",
    [
        ("fox", "née"),
        np.array(["fox", "née"]),
        np.array(["fox", "née"], dtype=object),
        np.array([b"fox", "née".encode()]),
        [b"fox", "née".encode()],
        tf.constant(["fox", "née"]),
        [tf.constant("fox"), tf.constant("née")],
    ],
    ids=["tuple", "unicode", "object", "bytes array", "bytes", "tensor", "tensors"],
)
def test_containers_of_strings(tokenizer, texts):
    expected = [tokenizer("fox").tolist(), tokenizer("née").tolist()]
    assert [ids.tolist() for ids in tokenizer(texts)] == expected
    assert tokenizer(texts[1]).tolist() == expected[1]


def test_containers_of_ids(tokenizer):
    ids = tokenizer("The fox")
    for one in (ids, ids.tolist(), list(ids), tuple(ids), ids.astype("int64"), tf.constant(ids)):
        assert tokenizer.detokenize(one) == "The fox"
    assert tokenizer.detokenize(keras.ops.convert_to_tensor(ids)) == "The fox"
    assert tokenizer.detokenize(list(keras.ops.convert_to_tensor(ids))) == "The fox"
    assert tokenizer.detokenize(keras.ops.convert_to_tensor(ids[None])) == ["The fox"]
    assert tokenizer.detokenize([ids, tokenizer("a")]) == ["The fox", "a"]
    assert tokenizer.detokenize([ids.tolist(), []]) == ["The fox", ""]
    assert tokenizer.detokenize(tf.ragged.constant([ids.tolist(), [106]])) == [
        "The fox",
        "<start_of_turn>",
    ]
    assert tokenizer.detokenize(106) == "<start_of_turn>"
    assert tokenizer.detokenize([]) == ""
    assert tokenizer.detokenize(np.zeros((0, 4), "int32")) == []


def test_torch_ids(tokenizer):
    torch = pytest.importorskip("torch")
    assert tokenizer.detokenize(torch.tensor([106, 107])) == "<start_of_turn><end_of_turn>"


def test_tf_data_maps_the_tokenizer(proto, tokenizer):
    dataset = tf.data.Dataset.from_tensor_slices(["fox", "née"])
    assert [ids.tolist() for ids in dataset.map(tokenizer).as_numpy_iterator()] == [
        ids.tolist() for ids in tokenizer(["fox", "née"])
    ]
    dense = GemmaTokenizer(proto, sequence_length=5)
    mapped = dataset.batch(2).map(dense)
    assert mapped.element_spec == tf.TensorSpec((None, 5), tf.int32)
    assert next(mapped.as_numpy_iterator()).tolist() == dense(["fox", "née"]).tolist()
    with pytest.raises(ValueError, match="a string or a batch of strings"):
        dataset.batch(2).batch(1).map(tokenizer)
    turn = tf.data.Dataset.from_tensors("<end_of_turn>")
    plain = turn.map(lambda x: tokenizer(x, parse_special=False))
    assert next(turn.map(tokenizer).as_numpy_iterator()).tolist() == [107]
    assert 107 not in next(plain.as_numpy_iterator())


# Tokens.


def test_tokens_and_special_ids(tokenizer):
    assert tokenizer.token_to_id("<start_of_turn>") == 106
    assert tokenizer.token_to_id(b"<end_of_turn>") == 107
    assert tokenizer.token_to_id("no such piece") == 3
    assert tokenizer.id_to_token(107) == "<end_of_turn>"
    assert tokenizer.id_to_token(np.int32(2)) == "<bos>"
    ids = tokenizer.start_token_id, tokenizer.end_token_id, tokenizer.pad_token_id
    assert ids == (2, 1, 0)
    assert tokenizer.end_of_turn_token_id == 107
    assert tokenizer.stop_token_ids == [1, 107]


def word_vocabulary(**pieces):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps"]),
        model_writer=model,
        vocab_size=9,
        model_type="word",
        minloglevel=2,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        **pieces,
    )
    return model.getvalue()


def test_a_vocabulary_without_turns_stops_on_eos():
    tokenizer = GemmaTokenizer(
        word_vocabulary(pad_piece="<pad>", bos_piece="<bos>", eos_piece="<eos>")
    )
    assert tokenizer.end_of_turn_token_id is None
    assert tokenizer.stop_token_ids == [2]


# Saving.


def test_config_round_trip(proto):
    tokenizer = GemmaTokenizer(proto, sequence_length=7, add_bos=True, add_eos=True, name="words")
    config = tokenizer.get_config()
    again = GemmaTokenizer.from_config(config)
    assert again.get_config() == config
    assert again("The fox").tolist() == tokenizer("The fox").tolist()
    stored = keras.saving.serialize_keras_object(tokenizer)
    assert stored["registered_name"] == "keras_gemma>GemmaTokenizer"
    assert keras.saving.deserialize_keras_object(stored)("a").tolist() == tokenizer("a").tolist()
    assert GemmaTokenizer(config["proto"])("fox").tolist() == GemmaTokenizer(proto)("fox").tolist()


def test_a_kerashub_config_is_accepted(proto):
    config = keras_hub.models.GemmaTokenizer(proto).get_config()
    tokenizer = GemmaTokenizer.from_config(config)
    tokenizer.set_proto(proto)
    assert tokenizer.dtype == "int32"
    assert tokenizer("fox").size


def test_assets_round_trip(tmp_path, proto, tokenizer):
    folder = tmp_path / "assets" / "tokenizer"
    folder.mkdir(parents=True)
    tokenizer.save_assets(folder)
    assert (folder / "vocabulary.spm").read_bytes() == proto
    empty = GemmaTokenizer(None)
    empty.load_assets(str(folder))
    assert empty("fox").tolist() == tokenizer("fox").tolist()
    assert GemmaTokenizer(folder / "vocabulary.spm")("fox").tolist() == tokenizer("fox").tolist()
    empty = GemmaTokenizer()
    empty.load_preset_assets(tmp_path)
    assert empty.start_token_id == 2


def test_a_copy_tokenizes(tokenizer):
    assert copy.deepcopy(tokenizer)("fox").tolist() == tokenizer("fox").tolist()


# Bad input.


def test_missing_vocabulary(tmp_path):
    tokenizer = GemmaTokenizer()
    assert tokenizer.start_token_id is None
    for use in (
        lambda: tokenizer("fox"),
        lambda: tokenizer.encode(["fox"]),
        lambda: tokenizer.detokenize([1]),
        lambda: tokenizer.vocabulary_size(),
        lambda: tokenizer.get_vocabulary(),
        lambda: tokenizer.id_to_token(1),
        lambda: tokenizer.token_to_id("a"),
        lambda: tokenizer.special_token_ids,
        lambda: tokenizer.stop_token_ids,
        lambda: tokenizer.save_assets(tmp_path),
    ):
        with pytest.raises(ValueError, match=r"no vocabulary yet.*load_assets"):
            use()


def test_a_bad_vocabulary_is_refused(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"proto='.*missing.spm'"):
        GemmaTokenizer(str(tmp_path / "missing.spm"))
    for junk in (b"not a model", b""):
        with pytest.raises(ValueError, match="must be a SentencePiece model"):
            GemmaTokenizer(junk)
    with pytest.raises(ValueError, match="'<bos>' is missing"):
        GemmaTokenizer(word_vocabulary())
    with pytest.raises(TypeError, match="`proto` must be a path"):
        GemmaTokenizer(12)
    with pytest.raises(ValueError, match="Pass a path to the constructor"):
        GemmaTokenizer.from_config({**tokenizer.get_config(), "proto": "/some/vocabulary.spm"})


def test_bad_options_are_refused(proto):
    with pytest.raises(ValueError, match="`dtype`"):
        GemmaTokenizer(proto, dtype="float32")
    with pytest.raises(ValueError, match="sequence_length=0"):
        GemmaTokenizer(proto, sequence_length=0)


@pytest.mark.parametrize("text", [5, None, 1.5, ["a", 5], [["a"]], np.array([1, 2])])
def test_only_strings_are_accepted(tokenizer, text):
    with pytest.raises(TypeError, match="must be a string"):
        tokenizer(text)


def test_bad_strings_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
        tokenizer(np.array([["a", "b"]]))
    for text in ("\ud800", b"\xff"):
        with pytest.raises(ValueError, match="valid Unicode"):
            tokenizer(text)


def test_bad_texts_are_refused_by_encode(tokenizer):
    with pytest.raises(TypeError, match=r"`texts` must be a list of strings.*'fox'"):
        tokenizer.encode("fox")
    with pytest.raises(TypeError, match="must be a string"):
        tokenizer.encode([5])
    with pytest.raises(ValueError, match="valid Unicode"):
        tokenizer.encode(["\ud800"])


@pytest.mark.parametrize("flag", ["no", 1, None])
def test_flags_must_be_bools(tokenizer, flag):
    for use in (tokenizer, tokenizer.tokenize, tokenizer.encode):
        with pytest.raises(TypeError, match=rf"`parse_special` must.*parse_special={flag!r}"):
            use(["fox"], parse_special=flag)
    if flag is not None:
        with pytest.raises(TypeError, match=rf"skip_special_tokens={flag!r}"):
            tokenizer.detokenize([5], skip_special_tokens=flag)


def test_bad_ids_are_refused(tokenizer):
    for ids in ([5, 440], [-1], np.array([[1, 2], [3, 999]])):
        with pytest.raises(ValueError, match=r"range \[0, 440\)"):
            tokenizer.detokenize(ids)
    with pytest.raises(ValueError, match=r"id=440"):
        tokenizer.id_to_token(440)
    with pytest.raises(TypeError, match="integer ids"):
        tokenizer.detokenize([1.5, 2.0])
    with pytest.raises(TypeError, match="integer ids"):
        tokenizer.detokenize("fox")
    with pytest.raises(ValueError, match="one or two dimensions"):
        tokenizer.detokenize(np.zeros((1, 2, 3), "int32"))
