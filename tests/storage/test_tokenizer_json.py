"""tokenizer.json compared with `tokenizers`, transformers and SentencePiece."""

import json

import pytest
import sentencepiece
import tokenizers

from keras_gemma.storage.hugging_face.tokenizer_json import (
    read_tokenizer_json,
    write_tokenizer_json,
)
from keras_gemma.text.tokenizer import GemmaTokenizer
from keras_gemma.text.vocabulary import train_vocabulary
from tests.storage.texts import TEXTS


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def pieces_of(proto):
    return sentencepiece.SentencePieceProcessor(model_proto=proto)


def test_ids_and_texts_equal_sentencepiece(tiny_proto, tmp_path):
    path = write(tmp_path / "tokenizer.json", write_tokenizer_json(tiny_proto))
    theirs = tokenizers.Tokenizer.from_file(str(path))
    expected = pieces_of(tiny_proto)
    for text in TEXTS:
        ids = expected.encode(text)
        assert theirs.encode(text).ids == [2, *ids], text
        assert theirs.encode(text, add_special_tokens=False).ids == ids, text
        assert theirs.decode(ids, skip_special_tokens=False) == expected.decode(ids) == text


def test_words_without_merges(tmp_path):
    """Same kind of vocabulary as in the built-in chat preset."""
    proto = train_vocabulary(["to be, that is question"], 385, ["capital", "to▁be"])
    path = write(tmp_path / "tokenizer.json", write_tokenizer_json(proto))
    theirs = tokenizers.Tokenizer.from_file(str(path))
    for text in [*TEXTS, "the capitals, to be or not to  be,capital"]:
        ids = pieces_of(proto).encode(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids, text
    back = pieces_of(read_tokenizer_json(path))
    assert back.encode(text) == ids


def test_special_tokens_are_encoded_and_skipped(tiny_proto, tmp_path):
    path = write(tmp_path / "tokenizer.json", write_tokenizer_json(tiny_proto))
    theirs = tokenizers.Tokenizer.from_file(str(path))
    ids = theirs.encode("<bos><start_of_turn><eos><pad><unk>", add_special_tokens=False).ids
    assert ids == [2, 106, 1, 0, 3]
    assert theirs.decode(ids) == ""


@pytest.mark.parametrize("spelling", ["a b", ["a", "b"]])
def test_round_trip(spelling, tiny_proto, tmp_path):
    content = write_tokenizer_json(tiny_proto)
    if isinstance(spelling, list):
        content["model"]["merges"] = [merge.split(" ") for merge in content["model"]["merges"]]
    proto = read_tokenizer_json(write(tmp_path / "tokenizer.json", content))
    ours, expected = pieces_of(proto), pieces_of(tiny_proto)
    assert ours.vocab_size() == expected.vocab_size()
    for id in range(expected.vocab_size()):
        assert ours.id_to_piece(id) == expected.id_to_piece(id)
        for predicate in ("is_control", "is_unknown", "is_byte", "is_unused"):
            assert getattr(ours, predicate)(id) == getattr(expected, predicate)(id)
    for name in ("bos_id", "eos_id", "pad_id", "unk_id"):
        assert getattr(ours, name)() == getattr(expected, name)()
    for text in TEXTS:
        assert ours.encode(text) == expected.encode(text), text
    again = write_tokenizer_json(proto)
    assert again["added_tokens"] == content["added_tokens"]
    assert again["model"]["vocab"] == content["model"]["vocab"]


def test_vocabulary_with_many_merges(tmp_path):
    words = ["ab" * n + "ra" * m for n in range(1, 7) for m in range(7)] * 3
    proto = train_vocabulary([" ".join(words), "tabs\tor\tnot", "née à Genève"], 430)
    path = write(tmp_path / "tokenizer.json", write_tokenizer_json(proto))
    theirs, ours = tokenizers.Tokenizer.from_file(str(path)), pieces_of(read_tokenizer_json(path))
    for text in [*TEXTS, *words, "abababbabraararabab\tra née"]:
        ids = pieces_of(proto).encode(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids == ours.encode(text), text


def test_pieces_of_tabs(tmp_path, tiny_proto):
    """Gemma has pieces of several tabs, but a single tab is a byte piece."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(tiny_proto)
    tab = next(id for id, piece in enumerate(model.pieces) if piece.piece == "<0x09>")
    model.pieces.add(piece="\t\t", score=-1000, type=1)
    model.trainer_spec.vocab_size = len(model.pieces)
    content = write_tokenizer_json(model.SerializeToString())
    assert content["model"]["vocab"]["\t"] == tab
    path = write(tmp_path / "tokenizer.json", content)
    theirs, ours = tokenizers.Tokenizer.from_file(str(path)), pieces_of(read_tokenizer_json(path))
    for text in ("a\tb", "\t\t", "\t\t\t", "a\t\t\t\tb"):
        ids = pieces_of(model.SerializeToString()).encode(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids == ours.encode(text), text


def test_reads_files_of_transformers(tiny_proto, tmp_path):
    import transformers

    write(tmp_path / "tokenizer.json", write_tokenizer_json(tiny_proto))
    theirs = transformers.GemmaTokenizer.from_pretrained(tmp_path)
    theirs.add_tokens(["<added_later>"])
    theirs.save_pretrained(tmp_path)
    ours = GemmaTokenizer(read_tokenizer_json(tmp_path / "tokenizer.json"))
    assert ours.vocabulary_size() == len(theirs) == 513
    for text in [*TEXTS[:6], "to<added_later>sleep"]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode([text]) == [ids], text
        assert ours.detokenize(ids) == theirs.decode(ids)


@pytest.mark.parametrize("longest_first", [False, True])
def test_runs_of_spaces_that_are_merged(longest_first, tiny_proto, tmp_path):
    """Published files list runs as added tokens that never match, and merge them.

    Gemma 2's merges double a run, and Gemma 3's extend it to the longest piece.
    """
    content = write_tokenizer_json(tiny_proto)
    runs = [token for token in content["added_tokens"] if set(token["content"]) == {"▁"}]
    longest = max(len(token["content"]) for token in runs)
    for token in runs:
        token["normalized"] = False
    sizes = [(a, b) for a in range(1, longest) for b in range(1, longest - a + 1)]
    if longest_first:
        sizes.sort(key=lambda size: (-size[0], -size[1]))
    else:
        sizes.sort(key=sum)
    merges = [f"{'▁' * a} {'▁' * b}" for a, b in sizes]
    content["model"]["merges"] = merges + content["model"]["merges"]
    path = write(tmp_path / "tokenizer.json", content)
    theirs, ours = tokenizers.Tokenizer.from_file(str(path)), pieces_of(read_tokenizer_json(path))
    for count in (*range(1, 4 * longest), 100):
        for text in (" " * count, f"to{' ' * count}be", f"{' ' * count}\n{' ' * count}or"):
            ids = theirs.encode(text, add_special_tokens=False).ids
            assert ours.encode(text) == ids, text
    spaces = " " * (2 * longest + 1)
    assert (ours.encode(spaces) == pieces_of(tiny_proto).encode(spaces)) == longest_first


def edited(content, key, value):
    if key == "model":
        return content | {"model": content["model"] | value}
    return content | {key: value}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", {"type": "WordPiece"}, "its model is 'WordPiece', not 'BPE'"),
        ("model", {"type": "Unigram"}, "its model is 'Unigram'"),
        ("model", {"byte_fallback": False}, "model.byte_fallback is False, not True"),
        ("model", {"dropout": 0.1}, r"model.dropout is 0\.1"),
        ("model", {"end_of_word_suffix": "</w>"}, "model.end_of_word_suffix"),
        ("model", {"vocab": None}, "added_tokens are malformed"),
        ("model", {"merges": [1, 2]}, "added_tokens are malformed"),
        ("model", {"merges": ["a b c"]}, "merges that do not have two parts"),
        ("model", None, "lacks `model`"),
        ("added_tokens", [{"id": 5}], "added_tokens are malformed"),
        ("pre_tokenizer", {"type": "ByteLevel"}, "its pre_tokenizer is {'type': 'ByteLevel'}"),
        ("normalizer", {"type": "NFKC"}, "its normalizer is {'type': 'NFKC'}"),
        ("normalizer", None, "its normalizer is None"),
        (
            "added_tokens",
            [{"id": 4, "content": "<mask>", "lstrip": True}],
            "depend on their neighbors: <mask>",
        ),
    ],
)
def test_other_kinds_are_refused(key, value, message, tiny_proto, tmp_path):
    content = write_tokenizer_json(tiny_proto)
    content = content | {"model": None} if value is None and key == "model" else content
    if not (value is None and key == "model"):
        content = edited(content, key, value)
    path = write(tmp_path / "tokenizer.json", content)
    with pytest.raises(ValueError, match=message):
        read_tokenizer_json(path)


def test_merges_that_scores_cannot_express(tiny_proto, tmp_path):
    content = write_tokenizer_json(tiny_proto)
    merges = content["model"]["merges"]
    merged = [merge.replace(" ", "") for merge in merges]
    longer = next(m for m, text in zip(merges, merged, strict=True) if merged.count(text) > 1)
    content["model"]["merges"] = [merge for merge in merges if merge != longer]
    with pytest.raises(ValueError, match=f"no scores of pieces.*{longer.replace(' ', '')}"):
        read_tokenizer_json(write(tmp_path / "tokenizer.json", content))
    content["model"]["merges"] = [longer, *content["model"]["merges"]]
    with pytest.raises(ValueError, match=f"no scores of pieces.*{longer.replace(' ', '')}"):
        read_tokenizer_json(write(tmp_path / "tokenizer.json", content))


def test_ids_with_gaps_and_missing_tokens(tiny_proto, tmp_path):
    content = write_tokenizer_json(tiny_proto)
    vocabulary = content["model"]["vocab"]
    vocabulary["new"] = 600
    with pytest.raises(ValueError, match="a unique id, from 0 to 512"):
        read_tokenizer_json(write(tmp_path / "tokenizer.json", content))
    vocabulary["new"] = vocabulary.pop("<0x41>")
    with pytest.raises(ValueError, match=r"lacks 1 tokens that Gemma's tokenizer has: <0x41>\."):
        read_tokenizer_json(write(tmp_path / "tokenizer.json", content))
    (tmp_path / "tokenizer.json").write_text('{"model": {')
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_tokenizer_json(tmp_path / "tokenizer.json")


def test_unigram_models_cannot_be_converted():
    import io

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["to be or not to be", "that is the question"]),
        model_writer=model,
        model_type="unigram",
        vocab_size=19,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match=r"model_type=1, not 2; byte_fallback=False.*add_dummy"):
        write_tokenizer_json(model.getvalue())
