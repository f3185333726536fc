"""A new SentencePiece vocabulary with Gemma's settings and Gemma's special ids.

    0 <pad>   1 <eos>   2 <bos>   3 <unk>   4 <mask>   5 <2mass>   6 [@BOS@]
    7 … 105   <unused0> … <unused98>
    106 <start_of_turn>   107 <end_of_turn>
    108 …     runs of newlines, then runs of spaces, each one token; then words that were given
    …         256 bytes, for characters outside the vocabulary
    …         merges and characters, learned from the texts

Knows no tokenizer layer and no model.
"""

import io
from collections.abc import Iterable, Iterator

import sentencepiece

FIRST_RUN_ID = 108
BYTES = 256
LINE_LENGTH = 1000  # characters; SentencePiece skips lines of more than 4192 bytes in silence


def train_vocabulary(
    texts: Iterable[str], vocabulary_size: int, words: Iterable[str] = ()
) -> bytes:
    """A byte-pair vocabulary learned from `texts`.

    Text → ids → text is exact for all Unicode text. SentencePiece itself writes the space as
    U+2581 (▁) and reads a literal ▁ as a space; `GemmaTokenizer` keeps it, as bytes.

    Args:
        texts: the corpus, in pieces of any length.
        vocabulary_size: number of ids, special tokens and bytes included. From 8192 on, runs of up
            to 31 newlines or spaces are tokens of their own; below, runs of up to 4.
        words: strings that are one token each, wherever they stand; a space is written `▁`.

    Returns:
        the SentencePiece model, for `GemmaTokenizer(proto=...)` or a file `vocabulary.spm`.

    Raises:
        ValueError: a vocabulary that is too small for the special tokens or the characters of
            `texts`, or too large for what `texts` hold; no text at all.
        TypeError: `texts` is one string, or holds something else than strings.

    Example:

    ```python
    from keras_gemma import GemmaTokenizer
    from keras_gemma.text.vocabulary import train_vocabulary

    lines = ["The quick brown fox jumps over the lazy dog.", "It ran."]
    proto = train_vocabulary(lines, vocabulary_size=416)
    tokenizer = GemmaTokenizer(proto)
    ```
    """
    for name, given in {"texts": texts, "words": words}.items():
        if isinstance(given, str):
            raise TypeError(
                f"`{name}` must be an iterable of strings: put one text into a list. "
                f"Received one string of {len(given)} characters"
            )
    words = list(dict.fromkeys(words))
    if not all(isinstance(word, str) and word for word in words):
        raise TypeError(f"`words` must hold strings that are not empty. Received: words={words!r}")
    longest = 31 if vocabulary_size >= 8192 else 4
    runs = ["\n" * n for n in range(1, longest + 1)] + ["▁" * n for n in range(2, longest + 1)]
    runs += [word for word in words if word not in runs]
    minimum = FIRST_RUN_ID + len(runs) + BYTES + 1
    if vocabulary_size < minimum:
        raise ValueError(
            f"`vocabulary_size` must be at least {minimum} to hold the special tokens and bytes, "
            f"and the characters of `texts` beside. Received: vocabulary_size={vocabulary_size}"
        )
    lines = list(
        _lines(texts)
    )  # a list: errors inside an iterator, SentencePiece takes for its end
    if not lines:
        raise ValueError("`texts` must hold text to learn from. Received: nothing but empty lines")
    unused = [f"<unused{n}>" for n in range(99)]
    turns = ["<start_of_turn>", "<end_of_turn>"]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary_size,
            user_defined_symbols=["<mask>", "<2mass>", "[@BOS@]", *unused, *turns, *runs],
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
            "No vocabulary of this size can be learned from `texts`: choose a `vocabulary_size` "
            "between its characters and its merges, or give more text. Received: "
            f"vocabulary_size={vocabulary_size}. SentencePiece says: {error}"
        ) from error
    return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """The lines of `texts`, short enough for SentencePiece; newlines are tokens already."""
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"`texts` must hold strings. Received: {text!r}")
        for line in text.split("\n"):
            for start in range(0, len(line), LINE_LENGTH):
                yield line[start : start + LINE_LENGTH]
