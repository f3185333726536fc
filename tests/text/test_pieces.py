"""Round trips of any text, with and without control tokens, compared with SentencePiece."""

import copy
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from keras_gemma.text.pieces import Pieces

VOCABULARY = Path(__file__).parents[2] / "presets/gemma_tiny_en/assets/tokenizer/vocabulary.spm"
PIECES = Pieces(VOCABULARY.read_bytes())
REFERENCE = sentencepiece.SentencePieceProcessor(model_file=str(VOCABULARY))
NAMES = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]"]
NAMES += [f"<unused{n}>" for n in range(99)] + ["<start_of_turn>", "<end_of_turn>"]
CONTROL_IDS = set(range(108))

FRAGMENTS = [*" \t\n\r\0▁<>", " " * 9, "\n" * 9, "▁▁", "\r\n", "0123", "é", "\u0301", "日本", "😀"]
FRAGMENTS += ["\ufeff", "\ufffd", "\u3000", "\U0010ffff", "<0x02>", "<0xE2>", "<h1>", "<b", "os>"]
FRAGMENTS += ["<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<unused7>", "<unused", "7>"]
FRAGMENTS += ["<start_of_turn>", "<end_of_turn>", "<start_of_", "turn>", "\uff1cbos\uff1e"]
"""Fragments whose combinations form control tokens or parts of characters."""

TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=12).map("".join)
CHECKED = settings(max_examples=400, derandomize=True, deadline=None, database=None)


@CHECKED
@given(TEXTS)
@example("<start_of_<bos>turn>")
@example("<start_of_<start_of_turn>turn>")
@example("<start_of_▁turn>")
@example("▁<bos>▁")
def test_round_trip_of_any_text(text):
    parsed, plain = PIECES.encode([text])[0], PIECES.encode([text], parse_special=False)[0]
    assert PIECES.decode(parsed, skip_special=False) == text
    assert not CONTROL_IDS & set(plain)
    for skip_special in (None, True, False):
        assert PIECES.decode(plain, skip_special) == text


@CHECKED
@given(TEXTS)
def test_ids_equal_sentencepiece(text):
    text = text.replace("▁", "")
    if not any(name in text for name in NAMES[:4]):
        assert PIECES.encode([text])[0] == REFERENCE.encode(text)
    for name in NAMES:
        text = text.replace(name, "")
    if not any(name in text for name in NAMES):
        expected = REFERENCE.encode(text)
        assert PIECES.encode([text], parse_special=False)[0] == expected


@CHECKED
@given(st.lists(TEXTS, max_size=4), st.booleans())
def test_batches_equal_single_texts(texts, parse_special):
    rows = [PIECES.encode([text], parse_special)[0] for text in texts]
    assert PIECES.encode(texts, parse_special) == rows


@CHECKED
@given(st.lists(st.sampled_from([2, 106, 3, *range(115, 1024)]), max_size=12))
def test_any_ids_can_be_decoded(ids):
    """Bytes in any order, invalid UTF-8 included, with control tokens between them."""
    assert PIECES.decode(ids) == REFERENCE.decode(ids)
    shown, hidden = PIECES.decode(ids, False), PIECES.decode(ids, True)
    if not CONTROL_IDS & set(ids):
        assert shown == hidden == REFERENCE.decode(ids)
    for id in CONTROL_IDS & set(ids):
        assert NAMES[id] in shown
        assert NAMES[id] not in hidden


def test_control_tokens():
    assert PIECES.control_tokens == {name: id for id, name in enumerate(NAMES)}
    a, b = REFERENCE.piece_to_id(["a", "b"])
    for id, name in enumerate(NAMES):
        assert PIECES.encode([name, f"a{name}b"]) == [[id], [a, id, b]]
        assert PIECES.decode([id], False) == name
        assert PIECES.decode([id], True) == ""


def test_runs_are_single_tokens():
    for run in ("\n" * 4, " " * 4, "\n", "\n\n"):
        plain = PIECES.encode([run], parse_special=False)
        assert plain == PIECES.encode([run]) == [[REFERENCE.piece_to_id(run.replace(" ", "▁"))]]


def test_a_literal_space_character_is_three_bytes():
    ids = [PIECES.id_or_none(f"<0x{byte}>") for byte in ("E2", "96", "81")]
    assert PIECES.encode(["▁", " "]) == [ids, REFERENCE.encode(" ")]
    assert PIECES.decode(ids) == "▁"


def changed(proto, renamed=None, added=()):
    """Returns `proto` with renamed pieces, and with added pieces that are merged first."""
    model = sentencepiece_model_pb2.ModelProto.FromString(proto)
    for piece in model.pieces:
        piece.piece = (renamed or {}).get(piece.piece, piece.piece)
    for rank, name in enumerate(added):
        model.pieces.add(piece=name, score=1000 - rank, type=model.SentencePiece.NORMAL)
    return model.SerializeToString()


def test_control_tokens_of_other_models(proto):
    """CodeGemma and Gemma 3 rename unused pieces; some vocabularies have HTML tags."""
    control = ["<|fim_prefix|>", "<|file_separator|>", "<start_of_image>", "<image_soft_token>"]
    text = ["<h1>", "</b>", "<table>", "<|", "<start>"]
    renamed = {f"<unused{n}>": name for n, name in enumerate([*control, *text])}
    pieces = Pieces(changed(proto, renamed))
    for n, name in enumerate([*control, *text]):
        plain = pieces.encode([name], parse_special=False)[0]
        assert pieces.encode([name]) == [[7 + n]]
        assert (name in pieces.control_tokens) == (name in control)
        assert (plain == [7 + n]) == (name in text)
        assert pieces.decode(plain) == name


def test_longest_control_token_is_matched(proto):
    pieces = Pieces(changed(proto, {"<pad>": "<s", "<eos>": "<s>"}))
    assert pieces.encode(["<s><s"]) == [[1, 0]]


def test_merges_never_form_a_control_token(proto):
    name = "<start_of_turn>"
    pieces = Pieces(changed(proto, added=[name[:end] for end in range(1, len(name))]))
    plain = pieces.encode([name], parse_special=False)[0]
    assert [pieces.names()[id] for id in plain] == [name[:-1], "<0x3E>"]
    assert pieces.encode([name]) == [[106]]


def test_vocabulary_without_bytes():
    """Without bytes, a literal `▁` is a space, as in SentencePiece."""
    model = sentencepiece_model_pb2.ModelProto.FromString(PIECES.proto)
    pieces = [piece for piece in model.pieces if piece.type != model.SentencePiece.BYTE]
    del model.pieces[:]
    model.pieces.extend(pieces)
    model.trainer_spec.byte_fallback = False
    pieces = Pieces(model.SerializeToString())
    space = pieces.encode([" "])[0]
    for parse_special in (True, False):
        assert pieces.encode(["▁", ""], parse_special) == [space, []]


def test_a_copy_works():
    assert copy.deepcopy(PIECES).encode(["<bos>"]) == [[2]]


@pytest.mark.parametrize("texts", [["a\ud800b"], ["c", "a\ud800b"]])
def test_half_of_a_surrogate_pair(proto, texts):
    with pytest.raises(ValueError, match=r"valid Unicode.*Received: 'a\\ud800b'"):
        Pieces(proto).encode(texts)
