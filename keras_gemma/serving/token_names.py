"""Strings and bytes of single tokens, and log-probabilities in OpenAI's formats."""

from collections.abc import Sequence
from typing import Any

from keras_gemma.causal_lm.text_engine import TextToken, TokenScore
from keras_gemma.text.pieces import Pieces

MIN_LOGPROB = -9999.0
"""Log-probability of a token that is impossible. JSON has no infinity."""


class TokenNames:
    """Strings and bytes of the tokens of a vocabulary.

    Args:
        pieces: The vocabulary.
        as_ids: If True, strings are `token_id:N`.
    """

    def __init__(self, pieces: Pieces, as_ids: bool = False) -> None:
        self.pieces = pieces
        self.as_ids = as_ids

    def bytes_of(self, id: int) -> bytes:
        """Returns the bytes of a token. A control token has those of its name."""
        if self.pieces.processor.is_byte(id):
            return bytes([int(self.pieces.processor.id_to_piece(id)[3:-1], 16)])
        return self.pieces.decode([id], False).encode()

    def string_of(self, id: int) -> str:
        r"""Returns the string of a token. Part of a character is written as `bytes:\xe2`."""
        if self.as_ids:
            return f"token_id:{id}"
        value = self.bytes_of(id)
        try:
            return value.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in value)

    def chat_logprobs(self, tokens: Sequence[TextToken], count: int) -> list[dict[str, Any]]:
        """Returns `logprobs.content` of a chat completion, with `count` top tokens each."""
        return [
            {
                **self._entry(token.id, token.score.logprob),
                "top_logprobs": [self._entry(*pair) for pair in token.score.top[:count]],
            }
            for token in tokens
            if token.score is not None
        ]

    def _entry(self, id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self.string_of(id),
            "logprob": max(logprob, MIN_LOGPROB),
            "bytes": list(self.bytes_of(id)),
        }

    def completion_logprobs(
        self, tokens: Sequence[tuple[int, TokenScore | None]], count: int, offset: int
    ) -> tuple[dict[str, Any], int]:
        """Returns `logprobs` of a completion, and the offset of the text after it.

        Args:
            tokens: Id and score of each token. The first token of a prompt has no score.
            count: Number of top tokens. The chosen token is added if it is not one of them.
            offset: Offset of the first token in the text, in characters.
        """
        offsets, strings = [], []
        for id, _ in tokens:
            offsets.append(offset)
            strings.append(self.string_of(id))
            offset += self.length_of(id)
        logprobs: dict[str, Any] = {
            "tokens": strings,
            "token_logprobs": [score and max(score.logprob, MIN_LOGPROB) for _, score in tokens],
            "top_logprobs": [
                score and self._top(string, score, count)
                for string, (_, score) in zip(strings, tokens, strict=True)
            ],
            "text_offset": offsets,
        }
        return logprobs, offset

    def _top(self, string: str, score: TokenScore, count: int) -> dict[str, float]:
        top: dict[str, float] = {}
        for id, logprob in score.top[:count]:
            top.setdefault(self.string_of(id), max(logprob, MIN_LOGPROB))
        top[string] = max(score.logprob, MIN_LOGPROB)
        return top

    def length_of(self, id: int) -> int:
        """Returns the number of characters that begin in a token. Control tokens have none."""
        if self.pieces.processor.is_byte(id):
            # Bytes that continue a character have the form 10xxxxxx.
            return int(self.bytes_of(id)[0] & 0xC0 != 0x80)
        return len(self.pieces.decode([id]))
