"""A sample as ids, and which of them are learned.

    <bos>  <start_of_turn> user \n Hi <end_of_turn> \n  <start_of_turn> model \n Yo <end_of_turn> \n
    learned:                                                                     ^^^^^^^^^^^^^^^^

Knows the turns of Gemma's template as ids: text in a turn never becomes a control token, and no
`<bos>` is added to the one that each document begins with.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from keras_gemma.text.tokenizer import GemmaTokenizer
from keras_gemma.training.samples import BadSample, Turn

START_OF_TURN = "<start_of_turn>"


class Document(NamedTuple):
    """Inputs and what follows each, int32 `[n]`, and whether that is learned, bool `[n]`."""

    inputs: np.ndarray
    labels: np.ndarray
    learned: np.ndarray


def document_maker(
    tokenizer: GemmaTokenizer, loss_on: str
) -> Callable[[list[Turn] | str], Document]:
    """A function from samples to documents.

    Args:
        tokenizer: its vocabulary has the control tokens of turns, where there are any.
        loss_on: `"assistant"`, the model's turns and the `<end_of_turn>` after each; or `"all"`,
            every token after `<bos>`. Plain texts are always learned as a whole.
    """
    start, end = tokenizer.token_to_id(START_OF_TURN), tokenizer.end_of_turn_token_id
    user, model, newline = tokenizer.encode(["user\n", "model\n", "\n"], parse_special=False)
    opening = {"user": [start, *user], "model": [start, *model]}

    def of_turns(turns: list[Turn]) -> tuple[list[int], list[bool]]:
        if end is None or tokenizer.id_to_token(start) != START_OF_TURN:
            raise ValueError(
                "The `tokenizer` has no tokens <start_of_turn> and <end_of_turn>, so it cannot "
                "write conversations: use Gemma's own vocabulary, or plain texts."
            )
        ids, learned = [tokenizer.start_token_id], [False]
        contents = tokenizer.encode([turn.content for turn in turns], parse_special=False)
        for turn, content in zip(turns, contents, strict=True):
            before, own = opening[turn.role], [*content, end]
            ids += [*before, *own, *newline]
            counts = turn.role == "model"
            learned += [False] * len(before) + [counts] * len(own) + [False] * len(newline)
        return ids, [True] * len(ids) if loss_on == "all" else learned

    def of_text(text: str) -> tuple[list[int], list[bool]]:
        (ids,) = tokenizer.encode([text], parse_special=False)
        ids = [tokenizer.start_token_id, *ids, tokenizer.end_token_id]
        return ids, [True] * len(ids)

    def make(sample: list[Turn] | str) -> Document:
        ids, learned = of_text(sample) if isinstance(sample, str) else of_turns(sample)
        whole = np.array(ids, "int32")
        return Document(whole[:-1], whole[1:], np.array(learned[1:], "bool"))

    return make


def fit_into(document: Document, length: int, truncate: bool) -> tuple[Document, bool]:
    """The document, cut where it is longer than `length` inputs, and whether it was.

    Raises:
        BadSample: it is longer and shall not be cut, or nothing learned is left.
    """
    if len(document.inputs) <= length:
        return document, False
    if not truncate:
        raise BadSample(
            f"{len(document.inputs) + 1} tokens do not fit: sequence_length={length} holds "
            f"{length + 1}; use a larger one, or cut samples (`truncate`)"
        )
    document = Document(*(part[:length] for part in document))
    if not document.learned.any():
        raise BadSample(f"cut to {length + 1} tokens, nothing is left that would be learned")
    return document, True


def prompt_ids(tokenizer: GemmaTokenizer, text: str) -> list[int]:
    """What a model reads before it answers the question `text`."""
    start, end = tokenizer.token_to_id(START_OF_TURN), tokenizer.end_of_turn_token_id
    parts = ["user\n", text.strip(), "\n", "model\n"]
    user, content, newline, model = tokenizer.encode(parts, parse_special=False)
    return [tokenizer.start_token_id, start, *user, *content, end, *newline, start, *model]
