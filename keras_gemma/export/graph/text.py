"""Text in a TensorFlow graph: strings to ids and back, the same ids as `GemmaTokenizer`.

TensorFlow Text has SentencePiece itself; what is added is what `text/pieces.py` adds to it. Knows
no model.
"""

import hashlib
import re

import tensorflow as tf
import tensorflow_text as tf_text

from keras_gemma.text.pieces import Pieces

SPACES = "[\\t-\\r\\x1c-\\x20\\x{85}\\p{Z}]"
"""What `str.strip` takes for white space, in RE2."""

MARK = b"\xff"
"""A byte that no UTF-8 has."""


class Atoms(tf.Module):
    """Strings of a text that SentencePiece is not shown, and the ids that they become.

    Args:
        atoms: the ids of each, in the order in which they are looked for.
    """

    def __init__(self, atoms: dict[str, list[int]]) -> None:
        super().__init__()
        self.pattern = "|".join(map(re.escape, atoms))
        self.ids = [[], *atoms.values()]  # none, for what is no atom
        places = tf.lookup.KeyValueTensorInitializer(
            list(atoms), tf.range(1, len(atoms) + 1), tf.string, tf.int32
        )
        self.places = tf.lookup.StaticHashTable(places, 0)


class GraphText(tf.Module):
    """A vocabulary.

    Args:
        pieces: the vocabulary on the host.
    """

    def __init__(self, pieces: Pieces) -> None:
        super().__init__()
        self.size = pieces.size
        self.reader = _sentencepiece(pieces.plain_proto)
        self.writer = _sentencepiece(pieces.proto)
        self.special, self.plain = (
            Atoms(atoms) if atoms else None for atoms in map(pieces.atoms, (True, False))
        )

    def encode(self, texts: tf.Tensor, parse_special: bool = True) -> tf.RaggedTensor:
        """Strings `[B]` -> int32 ids `[B, (T)]`; `parse_special` as of `GemmaTokenizer`."""
        atoms = self.special if parse_special else self.plain
        if atoms is None:
            return self.reader.tokenize(texts)
        marked = tf.strings.regex_replace(texts, f"({atoms.pattern})", MARK + b"\\1" + MARK)
        parts = tf.strings.split(marked, MARK)
        places = atoms.places.lookup(parts.flat_values)
        between = tf.where(places > 0, "", parts.flat_values)
        ids = [tf.gather(tf.ragged.constant(atoms.ids, tf.int32), places)]
        ids = tf.concat([*ids, self.reader.tokenize(between)], axis=1)
        return parts.with_flat_values(ids).merge_dims(1, 2)

    def decode(self, ids: tf.RaggedTensor) -> tf.Tensor:
        """Ids of the vocabulary `[B, (T)]` -> strings `[B]`."""
        return self.writer.detokenize(ids)


def _sentencepiece(proto: bytes) -> tf_text.SentencepieceTokenizer:
    """SentencePiece, under a name that no other vocabulary has.

    In a process that loads it, TensorFlow takes vocabularies of one name for the same one.
    """
    name = "vocabulary_" + hashlib.sha256(proto).hexdigest()[:16]
    return tf_text.SentencepieceTokenizer(proto, out_type=tf.int32, name=name)


def strip(texts: tf.Tensor) -> tf.Tensor:
    """What `str.strip` makes of strings."""
    return tf.strings.regex_replace(rstrip(texts), f"^{SPACES}+", "")


def rstrip(texts: tf.Tensor) -> tf.Tensor:
    """What `str.rstrip` makes of strings."""
    return tf.strings.regex_replace(texts, f"{SPACES}+$", "")
