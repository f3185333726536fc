"""Streams yield the text of `generate` in pieces."""

import pytest

from keras_gemma import backend

TEXTS = ["To be, or", "Whether 'tis nobler in the mind"]


@pytest.mark.parametrize("settings", [{}, {"temperature": 3.0, "seed": 1}], ids=str)
def test_pieces_are_the_text(lm, settings):
    settings = {"max_new_tokens": 12, **settings}
    expected = lm.generate(TEXTS, strip_prompt=True, **settings)
    pieces = list(lm.stream(TEXTS[0], **settings))
    assert len(pieces) > 3 and "".join(pieces) == expected[0]
    rows = list(lm.stream(TEXTS, **settings))
    assert all(len(row) == 2 for row in rows)
    assert ["".join(column) for column in zip(*rows, strict=True)] == expected


def test_first_piece_is_yielded_before_the_rest_is_generated(lm, monkeypatch):
    limits = []
    whole = backend.while_loop

    def loop(proceed, step):
        run = whole(proceed, step)
        return lambda weights, state, limit: limits.append(limit) or run(weights, state, limit)

    monkeypatch.setattr(backend, "while_loop", loop)
    monkeypatch.setattr(lm, "_programs", None)
    stream = lm.stream(TEXTS[0], max_new_tokens=30, stop_token_ids=None)
    assert limits == []  # generation starts with the first `next`
    next(stream)
    assert len(limits) <= 2
    stream.close()
    count = len(limits)
    assert list(stream) == [] and len(limits) == count


def test_arguments_are_checked_at_the_call(lm):
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        lm.stream("To be", max_new_tokens=0)
    with pytest.raises(ValueError, match="There must be at least one prompt"):
        lm.stream([])
