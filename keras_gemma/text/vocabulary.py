"""Training of a SentencePiece vocabulary with Gemma's settings and special ids.

    0 <pad>   1 <eos>   2 <bos>   3 <unk>   4 <mask>   5 <2mass>   6 [@BOS@]
    7 … 105   <unused0> … <unused98>
    106 <start_of_turn>   107 <end_of_turn>
    108 …     runs of newlines, runs of spaces, and `words`, one token each
    …         256 bytes, for characters outside the vocabulary
    …         merges and characters, learned from the texts

Knows nothing about the tokenizer layer and models.
"""

import io
from collections.abc import Iterable, Iterator

import sentencepiece

MAX_LINE_LENGTH = 1000
"""Maximum line length, in characters. SentencePiece silently skips lines above 4192 bytes."""


def train_vocabulary(
    texts: Iterable[str], vocabulary_size: int, words: Iterable[str] = ()
) -> bytes:
    """Trains a byte-pair vocabulary on `texts`.

    `GemmaTokenizer` encodes and decodes all Unicode text without loss. Without it, SentencePiece
    reads a literal U+2581 (▁) as a space.

    Args:
        texts: Strings of any length.
        vocabulary_size: Number of token ids, including special tokens and bytes. Runs of up to 31
            newlines or spaces are one token each if it is at least 8192, otherwise runs of up to 4.
        words: Strings that are always one token. A space in them is written as `▁`.

    Returns:
        The SentencePiece model, in bytes, for `GemmaTokenizer(proto=...)` or a vocabulary.spm file.

    Raises:
        ValueError: If `vocabulary_size` is too small for the special tokens and the characters of
            `texts`, or too large for `texts`, or `texts` is empty.
        TypeError: If `texts` or `words` is one string, or has anything but strings.

    Example:

    ```python
    from keras_gemma import GemmaTokenizer
    from keras_gemma.text.vocabulary import train_vocabulary

    lines = ["The quick brown fox jumps over the lazy dog.", "It ran."]
    proto = train_vocabulary(lines, vocabulary_size=416)
    tokenizer = GemmaTokenizer(proto)
    ```
    """
    for name, value in {"texts": texts, "words": words}.items():
        if isinstance(value, str):
            raise TypeError(
                f"`{name}` must be an iterable of strings. Put a single string into a list. "
                f"Received: one string of {len(value)} characters"
            )
    words = list(dict.fromkeys(words))
    if not all(isinstance(word, str) and word for word in words):
        raise TypeError(f"`words` must be non-empty strings. Received: words={words!r}")
    max_run = 31 if vocabulary_size >= 8192 else 4
    runs = ["\n" * n for n in range(1, max_run + 1)] + ["▁" * n for n in range(2, max_run + 1)]
    runs += [word for word in words if word not in runs]
    # A list, because SentencePiece takes an error in an iterator for its end.
    lines = list(_lines(texts))
    if not lines:
        raise ValueError("`texts` must not be empty. Received: no text, or only empty lines")
    controls = ["<mask>", "<2mass>", "[@BOS@]", *(f"<unused{n}>" for n in range(99))]
    controls += ["<start_of_turn>", "<end_of_turn>"]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary_size,
            user_defined_symbols=[*controls, *runs],
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            pad_piece="<pad>",
            eos_piece="<eos>",
            bos_piece="<bos>",
            unk_piece="<unk>",
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            "SentencePiece cannot train a vocabulary of this size on `texts`. Change "
            "`vocabulary_size`, or pass more text. "
            f"Received: vocabulary_size={vocabulary_size}. SentencePiece reports: {error}"
        ) from error
    return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Yields the lines of `texts`, split to at most `MAX_LINE_LENGTH` characters."""
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"`texts` must be strings. Received: {text!r}")
        for line in text.split("\n"):
            for start in range(0, len(line), MAX_LINE_LENGTH):
                yield line[start : start + MAX_LINE_LENGTH]
