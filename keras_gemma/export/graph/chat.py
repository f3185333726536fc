"""Conversations to token ids with Gemma's chat template, in a TensorFlow graph.

Returns the same ids as `text/chat.py`: control tokens in the text of a message are not parsed, so
a message cannot forge a turn.
"""

import tensorflow as tf

from keras_gemma.export.graph.settings import check, checked
from keras_gemma.export.graph.text import GraphText, strip
from keras_gemma.text.chat import END, START
from keras_gemma.text.tokenizer import GemmaTokenizer


class ChatTemplate:
    """Renders conversations as token ids, with the same vocabulary in the graph and on the host."""

    def __init__(self, text: GraphText, tokenizer: GemmaTokenizer) -> None:
        self.text = text
        constants = ([START], [f"{END}\n"], [f"{START}model\n"])
        self.begin, self.end, self.ask = (tokenizer.encode(text)[0] for text in constants)
        self.bos = [tokenizer.start_token_id]

    def render(self, roles: tf.Tensor, contents: tf.Tensor) -> tf.RaggedTensor:
        """Returns the token ids `[B, (T)]` of conversations with strings `[B, M]`.

        Roles are `""` after the end of a conversation. A system message before all others is folded
        into the first user turn.
        """
        index = tf.range(tf.shape(roles)[1])[None]
        used, system = roles != "", (roles == "system") & (index == 0)
        turns = tf.ragged.boolean_mask(roles, used & ~system)
        dense, count = turns.to_tensor(""), tf.cast(turns.row_lengths(), tf.int32)
        from_user = tf.range(tf.shape(dense)[1])[None] % 2 == 0
        alternates = tf.where(
            from_user, dense == "user", (dense == "assistant") | (dense == "model")
        )
        rule = "Roles must alternate: user, assistant, user, ..., optionally after one system, "
        checks = [
            check(
                tf.reduce_all(alternates | (dense == "")) & tf.reduce_all(count % 2 == 1),
                rule + "and end with user, followed only by empty strings. Received:",
                roles,
            ),
            check(
                used[:, :-1] | ~used[:, 1:],
                rule + "without empty strings between them. Received:",
                roles,
            ),
            check(
                tf.reduce_all(tf.shape(roles) == tf.shape(contents)),
                "`roles` and `contents` must have the same shape. Received, shape of `contents`:",
                tf.shape(contents),
            ),
        ]
        contents = checked(contents, checks)
        trimmed = tf.reshape(strip(tf.reshape(contents, [-1])), tf.shape(roles))
        contents = tf.where(system, contents, trimmed)
        preface = tf.where(tf.reduce_any(system, axis=1), contents[:, 0] + "\n\n", "")
        contents = tf.ragged.boolean_mask(contents, used & ~system)
        first = contents.row_starts()
        texts = tf.tensor_scatter_nd_update(
            contents.flat_values, first[:, None], preface + tf.gather(contents.flat_values, first)
        )
        names = tf.where(turns.flat_values == "user", "user", "model")
        ids = self.text.encode(names + "\n" + texts, parse_special=False)
        ids = tf.concat([_repeat(self.begin, ids), ids, _repeat(self.end, ids)], axis=1)
        ids = contents.with_flat_values(ids).merge_dims(1, 2)
        return tf.concat([_repeat(self.bos, ids), ids, _repeat(self.ask, ids)], axis=1)


def _repeat(row: list[int], like: tf.RaggedTensor) -> tf.RaggedTensor:
    """Returns a tensor with `row` as each row, and as many rows as `like`."""
    rows = tf.tile(tf.constant([row], tf.int32), [like.nrows(tf.int32), 1])
    return tf.RaggedTensor.from_tensor(rows, row_splits_dtype=like.row_splits.dtype)
