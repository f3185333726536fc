"""Incremental text: complete, with whole characters, and nothing after a stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_gemma.text.stream import TextStream
from keras_gemma.text.tokenizer import GemmaTokenizer

LETTERS = "abc é€𝄞\n"


@pytest.fixture(scope="module")
def tokenizer(tiny_proto):
    return GemmaTokenizer(tiny_proto)


def decode_utf8(ids):
    return bytes(ids).decode("utf-8", errors="replace")


@settings(max_examples=200, deadline=None)
@given(text=st.text(LETTERS), sizes=st.lists(st.integers(1, 3), min_size=1))
def test_pieces_join_to_the_text_with_whole_characters(text, sizes):
    stream, rest, pieces = TextStream(decode_utf8), list(text.encode()), []
    while rest:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(stream.push(rest[:size]))
        rest = rest[size:]
    pieces.append(stream.finish())
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab", max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_first_complete_stop_string_ends_the_text(text, stops):
    stream = TextStream(decode_utf8, stops)
    released = ""
    for i, id in enumerate(text.encode()):
        released += stream.push([id])
        complete = [stop for stop in stops if stop in text[: i + 1]]
        assert stream.stopped == bool(complete)
        if complete:
            end = min(text.find(stop) for stop in complete)
            assert released == text[:end]
            assert stream.pushed == i + 1 and stream.rest == text[end : i + 1]
            break
        # All text is released, except the possible beginning of a stop string.
        withheld = text[len(released) : i + 1]
        assert text.startswith(released)
        assert not withheld or any(stop.startswith(withheld) for stop in stops)
    else:
        assert released + stream.finish() == text


def test_incomplete_bytes_become_a_replacement_character():
    stream = TextStream(decode_utf8)
    assert stream.push([0xE2]) == stream.push([0x82]) == ""
    assert stream.finish() == "\ufffd"


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30))
def test_tokens_of_a_text_stream_to_the_text(tokenizer, text):
    ids = tokenizer.encode([text], parse_special=False)[0]
    stream = TextStream(tokenizer.detokenize)
    assert "".join(stream.push([id]) for id in ids) + stream.finish() == text


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 511), max_size=30))
def test_any_ids_stream_to_their_text(tokenizer, ids):
    stream = TextStream(tokenizer.detokenize)
    pieces = [stream.push([id]) for id in ids]
    assert "".join(pieces) + stream.finish() == (tokenizer.detokenize(ids) if ids else "")
