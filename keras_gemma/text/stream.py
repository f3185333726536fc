"""Incremental detokenization: whole characters only, and nothing after a stop string."""

from collections.abc import Callable, Sequence

REPLACEMENT_CHARACTER = "\ufffd"
"""Decoded form of a character whose bytes are incomplete."""


class TextStream:
    """Incremental text of one sequence.

    Text that may be the beginning of a stop string is withheld until decided. The texts of two
    lists that `decode` returns must add up to the text of the joined list, unless the bytes of a
    character are split between them.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self.decode = decode
        self.stops = tuple(stops)
        self.stopped = False  # True if a stop string is complete
        self.pushed = 0  # number of ids, up to the one that completed a stop string
        self.rest = ""  # withheld text, from the stop string on
        self._ids: list[int] = []  # ids of an incomplete character
        self._withheld = ""  # possible beginning of a stop string

    def push(self, ids: Sequence[int]) -> str:
        """Adds ids, and returns the text that is decided now."""
        if self.stopped:
            return ""
        self._ids += map(int, ids)
        self.pushed += len(ids)
        text = self.decode(self._ids)
        if text.endswith(REPLACEMENT_CHARACTER):
            return ""
        self._ids = []
        return self._release(text)

    def finish(self) -> str:
        """Returns the withheld text at the end of the sequence."""
        if self.stopped:
            return ""
        text = self._release(self.decode(self._ids))
        if not self.stopped:
            text += self._withheld
        self._ids, self._withheld = [], ""
        return text

    def _release(self, text: str) -> str:
        text = self._withheld + text
        starts = [start for start in map(text.find, self.stops) if start >= 0]
        if starts:
            self.stopped = True
            self.rest = text[min(starts) :]
            return text[: min(starts)]
        end = len(text) - max((longest_overlap(text, stop) for stop in self.stops), default=0)
        self._withheld = text[end:]
        return text[:end]


def longest_overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that is a beginning of `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
