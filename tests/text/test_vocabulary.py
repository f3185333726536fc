import random
from pathlib import Path

import pytest
import sentencepiece

from keras_gemma.text import train_vocabulary

SHAKESPEARE = Path(__file__).parents[2].parent / "shared" / "data" / "tinyshakespeare.txt"


def load(proto):
    return sentencepiece.SentencePieceProcessor(model_proto=proto)


def test_special_ids_equal_gemma(proto):
    pieces = load(proto)
    expected = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]"]
    expected += [f"<unused{n}>" for n in range(99)] + ["<start_of_turn>", "<end_of_turn>"]
    expected += ["\n", "\n\n", "\n\n\n", "\n\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<0x00>"]
    assert pieces.id_to_piece(list(range(len(expected)))) == expected
    assert (pieces.pad_id(), pieces.eos_id(), pieces.bos_id(), pieces.unk_id()) == (0, 1, 2, 3)
    assert pieces.piece_to_id("<unused98>") == 105
    assert pieces.piece_to_id("<end_of_turn>") == 107
    assert pieces.vocab_size() == 440


def test_digits_are_split_and_no_prefix_is_added(proto):
    pieces = load(proto)
    assert pieces.encode("345", out_type=str) == ["3", "4", "5"]
    assert not pieces.encode("The", out_type=str)[0].startswith("▁")


def test_training_is_repeatable():
    texts = ["the quick brown fox jumps over the lazy dog"]
    assert train_vocabulary(texts, 405) == train_vocabulary(iter(texts), 405)


def test_long_lines_are_used():
    line = "abcdefghij " * 2000  # longer than SentencePiece's maximum line
    pieces = load(train_vocabulary([line], 400))
    assert len(pieces.encode("abcdefghij")) < 5


def test_words_are_one_token_each():
    pieces = load(train_vocabulary(["to be or not, to"], 381, ["capital", "to▁be", "capital"]))
    assert pieces.encode("the capital, to be", out_type=str)[-4:] == ["capital", ",", "▁", "to▁be"]
    assert pieces.id_to_piece([115, 116]) == ["capital", "to▁be"]


@pytest.mark.parametrize("seed", range(5))
def test_text_survives_the_round_trip(proto, seed):
    pieces = load(proto)
    draw = random.Random(seed)
    alphabet = [
        *" \t\n\r\0",
        "  ",
        "\n\n",
        "fox",
        "12",
        "é",
        "\u0301",
        "日本",
        "😀",
        "👩‍👩‍👧",
        "\u2585",
    ]
    alphabet += ["<bos>", "<unk>", "<end_of_turn>", "<0x41>", "\ufeff", "\u3000", "\U0010ffff"]
    for _ in range(300):
        text = "".join(draw.choices(alphabet, k=draw.randrange(30)))
        text += "".join(
            chr(draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)]))
            for _ in range(8)
        )
        text = text.replace("▁", "")  # a literal ▁ is SentencePiece's space
        assert pieces.decode(pieces.encode(text)) == text


def test_all_characters_survive_the_round_trip(proto):
    pieces = load(proto)
    codes = [*range(0xD800), *range(0xE000, 0x110000)]
    text = "".join(chr(code) for code in codes if code != ord("▁"))
    for start in range(0, len(text), 50_000):
        part = text[start : start + 50_000]
        assert pieces.decode(pieces.encode(part)) == part


def test_larger_vocabularies_have_the_runs_of_gemma():
    if not SHAKESPEARE.exists():
        pytest.skip(f"no corpus at {SHAKESPEARE}")
    pieces = load(train_vocabulary([SHAKESPEARE.read_text("utf-8")], 8192))
    assert pieces.id_to_piece([108, 138, 139, 168]) == ["\n", "\n" * 31, "▁" * 2, "▁" * 31]
    assert pieces.id_to_piece(169) == "<0x00>"
    assert len(pieces.encode("to be, or not to be")) < 10


def test_bad_arguments_are_explained():
    with pytest.raises(ValueError, match=r"vocabulary_size=300.*Vocabulary size is smaller"):
        train_vocabulary(["text"], 300)
    with pytest.raises(ValueError, match=r"vocabulary_size=5000.*too high"):
        train_vocabulary(["text"], 5000)
    with pytest.raises(ValueError, match=r"vocabulary_size=373"):
        train_vocabulary(["abcdefghijklmnop"], 373)
    with pytest.raises(TypeError, match="Put a single string into a list"):
        train_vocabulary("text", 400)
    with pytest.raises(TypeError, match="`words` must be an iterable"):
        train_vocabulary(["text"], 400, "word")
    with pytest.raises(TypeError, match=r"Received: words=\['a', ''\]"):
        train_vocabulary(["text"], 400, ["a", ""])
    with pytest.raises(TypeError, match="`texts` must be strings"):
        train_vocabulary([b"text"], 400)
    with pytest.raises(ValueError, match="`texts` must not be empty"):
        train_vocabulary(["", "\n"], 400)


def test_errors_of_the_iterator_are_raised():
    def texts():
        yield "the quick brown fox jumps over the lazy dog\n" * 3
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        train_vocabulary(texts(), 400)
