"""Text as it is made, token by token: never half a character, never past a stop string."""

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"
"""What a character is decoded to whose bytes are not all there."""


class TextStream:
    """The text of one row that grows.

    Args:
        decode: ids to their text; the text of two lists is that of the lists together, but where
            the bytes of a character are parted.
        stops: strings that end the text; what they begin with is withheld until it is clear.

    Example:

    ```python
    from keras_gemma import GemmaTokenizer
    from keras_gemma.text.stream import TextStream

    tokenizer = GemmaTokenizer.from_preset("gemma_tiny_en")
    stream = TextStream(tokenizer.detokenize, stops=["end"])
    ids = tokenizer.encode(["Not the end of it"])[0]
    "".join(stream.push([id]) for id in ids) + stream.finish()  # "Not the "
    stream.stopped  # True
    ```
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self.decode = decode
        self.stops = tuple(stops)
        self.stopped = False
        self.pushed = 0  # ids, up to the one that completed a stop string
        self.rest = ""  # the stop string and what stands behind it
        self._ids: list[int] = []  # of a character that is not complete
        self._held = ""  # what may be the beginning of a stop string

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` make certain."""
        if self.stopped:
            return ""
        self._ids += map(int, ids)
        self.pushed += len(ids)
        text = self.decode(self._ids) if self._ids else ""
        if text.endswith(UNFINISHED):
            return ""
        self._ids = []
        return self._release(text)

    def finish(self) -> str:
        """What has been withheld, now that nothing follows."""
        if self.stopped:
            return ""
        text = self._release(self.decode(self._ids) if self._ids else "")
        if not self.stopped:
            text += self._held
        self._ids, self._held = [], ""
        return text

    def _release(self, text: str) -> str:
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.stopped = True
            self.rest = text[min(found) :]
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
