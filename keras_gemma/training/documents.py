"""Samples as token ids, with the tokens that have a loss.

    <bos>  <start_of_turn> user \n Hi <end_of_turn> \n  <start_of_turn> model \n Yo <end_of_turn> \n
    learned:                                                                     ^^^^^^^^^^^^^^^^

Control tokens written in a sample are plain text. Each document has one `<bos>`.
"""

from typing import NamedTuple

import numpy as np

from keras_gemma.text.chat import Turn, encode_turns
from keras_gemma.text.tokenizer import GemmaTokenizer
from keras_gemma.training.samples import BadSample


class Document(NamedTuple):
    """Token ids of one sample, as inputs and labels of `n` positions."""

    inputs: np.ndarray
    """All tokens but the last, int32 `[n]`."""
    labels: np.ndarray
    """Token after each input, int32 `[n]`."""
    learned: np.ndarray
    """True if the label has a loss, bool `[n]`."""


def make_document(sample: list[Turn] | str, tokenizer: GemmaTokenizer, loss_on: str) -> Document:
    """Converts a sample to a document.

    Args:
        sample: Result of `read_sample`.
        tokenizer: The tokenizer. For conversations, its vocabulary must have turn tokens.
        loss_on: `"assistant"` learns the model turns and the `<end_of_turn>` after each. `"all"`
            learns every token after `<bos>`. All tokens of plain texts are learned.

    Raises:
        ValueError: If the vocabulary has no turn tokens.
    """
    if isinstance(sample, str):
        (text,) = tokenizer.encode([sample], parse_special=False)
        ids, spans = [tokenizer.start_token_id, *text, tokenizer.end_token_id], None
    else:
        ids, spans = encode_turns(sample, tokenizer.pieces, prompt=False)
    ids = np.array(ids, "int32")
    learned = np.full(len(ids), spans is None or loss_on == "all")
    for span in spans or ():
        learned[span] = True
    return Document(ids[:-1], ids[1:], learned[1:])


def fit_to_length(document: Document, length: int, truncate: bool) -> tuple[Document, bool]:
    """Returns a document of at most `length` inputs, and True if it was truncated.

    Raises:
        BadSample: If the document is longer and `truncate` is False, or its rest has no loss.
    """
    if len(document.inputs) <= length:
        return document, False
    if not truncate:
        raise BadSample(
            f"{len(document.inputs) + 1} tokens do not fit, because sequence_length={length} "
            f"allows {length + 1}; increase it, or truncate samples (`truncate`)"
        )
    document = Document(*(part[:length] for part in document))
    if not document.learned.any():
        raise BadSample(f"truncated to {length + 1} tokens, the sample has no token to learn")
    return document, True
