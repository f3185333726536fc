"""Text as it is made: nothing is lost, nothing broken, nothing behind a stop string."""

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
def test_pieces_are_the_text_and_no_character_is_broken(text, sizes):
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
def test_a_stop_string_ends_the_text_where_it_is_complete_first(text, stops):
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
        # All is released but what may begin a stop string.
        held = text[len(released) : i + 1]
        assert text.startswith(released)
        assert not held or any(stop.startswith(held) for stop in stops)
    else:
        assert released + stream.finish() == text


def test_bytes_that_are_no_text_are_marked_at_the_end():
    stream = TextStream(decode_utf8)
    assert stream.push([0xE2]) == stream.push([0x82]) == ""
    assert stream.finish() == "\ufffd"


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30))
def test_token_by_token_as_the_tokenizer_has_it(tokenizer, text):
    ids = tokenizer.encode([text], parse_special=False)[0]
    stream = TextStream(tokenizer.detokenize)
    assert "".join(stream.push([id]) for id in ids) + stream.finish() == text


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 511), max_size=30))
def test_any_ids_as_the_tokenizer_has_them(tokenizer, ids):
    stream = TextStream(tokenizer.detokenize)
    pieces = [stream.push([id]) for id in ids]
    assert "".join(pieces) + stream.finish() == (tokenizer.detokenize(ids) if ids else "")
