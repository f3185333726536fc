"""Strings to token ids and back in a TensorFlow graph, with the same ids as `GemmaTokenizer`.

TensorFlow Text provides SentencePiece. This module adds what `text/pieces.py` adds to it; a change
there must be repeated here. Knows nothing about models.
"""

import hashlib
import re

import tensorflow as tf
import tensorflow_text as tf_text

from keras_gemma.text.pieces import Pieces

SPACES = "[\\t-\\r\\x1c-\\x20\\x{85}\\p{Z}]"
"""White space of `str.strip`, as a pattern of RE2."""

MARK = b"\xff"
"""A byte that does not occur in UTF-8."""


class Atoms(tf.Module):
    """Strings that become token ids without SentencePiece, in the order of the search."""

    def __init__(self, atoms: dict[str, list[int]]) -> None:
        super().__init__()
        self.pattern = "|".join(map(re.escape, atoms))
        self.ids = [[], *atoms.values()]  # index 0 for other text
        indices = tf.lookup.KeyValueTensorInitializer(
            list(atoms), tf.range(1, len(atoms) + 1), tf.string, tf.int32
        )
        self.indices = tf.lookup.StaticHashTable(indices, 0)


class GraphText(tf.Module):
    """Vocabulary in a graph."""

    def __init__(self, pieces: Pieces) -> None:
        super().__init__()
        self.size = pieces.size
        self.encoder = _sentencepiece(pieces.plain_proto)
        self.decoder = _sentencepiece(pieces.proto)
        self.special, self.plain = (
            Atoms(atoms) if atoms else None for atoms in map(pieces.atoms, (True, False))
        )

    def encode(self, texts: tf.Tensor, parse_special: bool = True) -> tf.RaggedTensor:
        """Returns the int32 token ids `[B, (T)]` of strings `[B]`, as `GemmaTokenizer` does."""
        atoms = self.special if parse_special else self.plain
        if atoms is None:
            return self.encoder.tokenize(texts)
        marked = tf.strings.regex_replace(texts, f"({atoms.pattern})", MARK + b"\\1" + MARK)
        parts = tf.strings.split(marked, MARK)
        indices = atoms.indices.lookup(parts.flat_values)
        other_text = tf.where(indices > 0, "", parts.flat_values)
        ids = [tf.gather(tf.ragged.constant(atoms.ids, tf.int32), indices)]
        ids = tf.concat([*ids, self.encoder.tokenize(other_text)], axis=1)
        return parts.with_flat_values(ids).merge_dims(1, 2)

    def decode(self, ids: tf.RaggedTensor) -> tf.Tensor:
        """Returns the strings `[B]` of token ids `[B, (T)]` of the vocabulary."""
        return self.decoder.detokenize(ids)


def _sentencepiece(proto: bytes) -> tf_text.SentencepieceTokenizer:
    """Returns SentencePiece. A process shares it between models, by a name per vocabulary."""
    name = "vocabulary_" + hashlib.sha256(proto).hexdigest()[:16]
    return tf_text.SentencepieceTokenizer(proto, out_type=tf.int32, name=name)


def strip(texts: tf.Tensor) -> tf.Tensor:
    """Returns strings without white space at both ends, as `str.strip` does."""
    return tf.strings.regex_replace(rstrip(texts), f"^{SPACES}+", "")


def rstrip(texts: tf.Tensor) -> tf.Tensor:
    """Returns strings without trailing white space, as `str.rstrip` does."""
    return tf.strings.regex_replace(texts, f"{SPACES}+$", "")
