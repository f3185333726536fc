"""`GemmaTokenizer`: strings to token ids and back, with a SentencePiece vocabulary.

Uses only NumPy, on any backend. Knows nothing about prompts and padding masks (`preprocessor.py`),
and about files other than the vocabulary.
"""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_gemma import tf_data
from keras_gemma.checks import check_integer
from keras_gemma.presettable import Presettable
from keras_gemma.text.chat import Message, Turn, encode_turns, read_turns, render
from keras_gemma.text.inputs import as_str, pad_rows, read_ids, read_texts
from keras_gemma.text.pieces import Pieces, decode_base64, read_proto

VOCABULARY_FILE = "vocabulary.spm"
STOP_TOKENS = ("<end_of_turn>", "<start_function_response>")
"""Tokens that end an answer, besides `<eos>`. FunctionGemma writes the second after a call."""


@keras.saving.register_keras_serializable(package="keras_gemma")
class GemmaTokenizer(Presettable, keras.layers.Layer):
    """Gemma's tokenizer. Converts strings to ids when called, and ids to strings in `detokenize`.

    Args:
        proto: SentencePiece model, as a path, bytes or a base64 string. `None` leaves the tokenizer
            without a vocabulary until `load_assets` or `set_proto` is called.
        dtype: Integer dtype of the ids. Defaults to `"int32"`.
        sequence_length: Number of tokens per row. Ids are truncated and padded to this length.
            `None` disables both.
        add_bos: If True, ids begin with `<bos>`. Preprocessors add it themselves. Defaults to
            False.
        add_eos: If True, ids end with `<eos>`, unless it is truncated. Defaults to False.
        **kwargs: Keras layer arguments `name` and `trainable`.

    Attributes:
        start_token, end_token, pad_token: `"<bos>"`, `"<eos>"`, `"<pad>"`.
        start_token_id, end_token_id, pad_token_id: Their ids, or `None` without a vocabulary.
        end_of_turn_token_id: Id of `<end_of_turn>`, or `None` if the vocabulary does not have it.

    Raises:
        FileNotFoundError: If the file `proto` does not exist.
        ValueError: If `proto` is not a SentencePiece model or lacks a special token, or another
            argument is invalid.

    Example:

    ```python
    from keras_gemma import GemmaTokenizer

    tokenizer = GemmaTokenizer.from_preset("gemma_tiny_en")
    tokenizer("The quick brown fox.")               # numpy int32 [T]
    tokenizer(["The quick brown fox.", "It ran."])  # a list of two such arrays
    tokenizer.detokenize(tokenizer("It ran."))      # "It ran."
    tokenizer("<bos>")                              # [2]
    tokenizer.tokenize("<bos>", parse_special=False)  # the ids of five characters
    ```
    """

    family = "Gemma"
    """Prefix of KerasHub's class names."""

    start_token = "<bos>"
    end_token = "<eos>"
    pad_token = "<pad>"

    def __init__(
        self,
        proto: str | Path | bytes | None = None,
        dtype: Any = "int32",
        sequence_length: int | None = None,
        add_bos: bool = False,
        add_eos: bool = False,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("config_file", None)  # KerasHub's presets name their own file here
        super().__init__(dtype=dtype, **kwargs)
        if not keras.backend.is_int_dtype(self.compute_dtype):
            raise ValueError(f"`dtype` must be an integer type. Received: dtype={dtype!r}")
        if sequence_length is not None:
            check_integer("sequence_length", sequence_length)
        self.sequence_length = sequence_length
        self.add_bos = add_bos
        self.add_eos = add_eos
        self.built = True
        self.set_proto(proto)

    def set_proto(self, proto: str | Path | bytes | None) -> None:
        """Sets the vocabulary: a path, bytes or a base64 string. `None` removes it."""
        self.proto = self._pieces = None
        self.start_token_id = self.end_token_id = self.pad_token_id = None
        self.end_of_turn_token_id = None
        if proto is None:
            return
        pieces = Pieces(read_proto(proto))
        ids = [pieces.id_or_none(token) for token in self.special_tokens]
        if None in ids:
            raise ValueError(
                f"`proto` must have the special tokens {self.special_tokens}, but "
                f"{self.special_tokens[ids.index(None)]!r} is missing. Use Gemma's vocabulary, or "
                f"one from `train_vocabulary`. Received: a vocabulary of {pieces.size} pieces"
            )
        self.proto, self._pieces = pieces.proto, pieces
        self.start_token_id, self.end_token_id, self.pad_token_id = ids
        self.end_of_turn_token_id = pieces.id_or_none("<end_of_turn>")

    @property
    def pieces(self) -> Pieces:
        """Vocabulary of the tokenizer.

        Raises:
            ValueError: If the vocabulary is missing.
        """
        self._check_vocabulary()
        return self._pieces

    def _check_vocabulary(self) -> None:
        if self._pieces is None:
            raise ValueError(
                f"The tokenizer {self.name!r} has no vocabulary yet. Create it with `proto=...` or "
                "`GemmaTokenizer.from_preset(...)`, or call its method `load_assets(directory)`."
            )

    def vocabulary_size(self) -> int:
        """Returns the number of token ids, V."""
        return self.pieces.size

    def get_vocabulary(self) -> list[str]:
        """Returns all pieces in the order of their ids. A space is written as `▁`."""
        return self.pieces.names()

    def id_to_token(self, id: int) -> str:
        """Returns the piece of an id.

        Raises:
            ValueError: If the id is out of range.
        """
        check_integer("id", id, 0, self.vocabulary_size() - 1)
        return self.pieces.processor.id_to_piece(int(id))

    def token_to_id(self, token: str | bytes) -> int:
        """Returns the id of a piece, or of `<unk>` if the vocabulary does not have the piece."""
        return self.pieces.processor.piece_to_id(as_str(token))

    @property
    def special_tokens(self) -> list[str]:
        """Start, end and padding tokens."""
        return [self.start_token, self.end_token, self.pad_token]

    @property
    def special_token_ids(self) -> list[int]:
        """Ids of `special_tokens`."""
        self._check_vocabulary()
        return [self.start_token_id, self.end_token_id, self.pad_token_id]

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids of `<eos>`, and of those in `STOP_TOKENS` that the vocabulary has."""
        ids = [self.end_token_id, *map(self.pieces.id_or_none, STOP_TOKENS)]
        return [id for id in ids if id is not None]

    def __call__(self, inputs: Any, parse_special: bool = True) -> Any:
        """Same as `tokenize`. Skips the `__call__` of Keras, which only accepts tensors."""
        return self.call(inputs, parse_special)

    def call(self, inputs: Any, parse_special: bool = True) -> Any:
        """Same as `tokenize`."""
        return self.tokenize(inputs, parse_special)

    def encode(self, texts: Sequence[str], parse_special: bool = True) -> list[list[int]]:
        """Returns the ids of each text, without the `<bos>`, `<eos>` and padding of `tokenize`.

        Args:
            texts: A list, tuple or 1-D array of strings.
            parse_special: Same as in `tokenize`.

        Raises:
            TypeError: If `texts` is not a list of strings.
            ValueError: If the vocabulary is missing.
        """
        vocabulary = self.pieces
        _check_flag("parse_special", parse_special)
        texts, batched = read_texts(texts)
        if not batched:
            raise TypeError(f"`texts` must be a list of strings. Received: texts={texts[0]!r:.80}")
        return vocabulary.encode(texts, parse_special)

    def tokenize(self, inputs: Any, parse_special: bool = True) -> Any:
        """Returns the ids of one text or a batch of texts.

        Args:
            inputs: A string, or a list, tuple, 1-D array or tensor of B strings. Symbolic tensors
                of `tf.data.Dataset.map` are accepted.
            parse_special: If True, names of control tokens such as `<start_of_turn>` become these
                tokens. If False, they are plain text: use it for untrusted text, such as user
                input. Defaults to True.

        Returns:
            Integers `[T]` for one string. For a batch, a list of B such arrays, or one array
            `[B, sequence_length]` if `sequence_length` is set. In `Dataset.map`, a batch without
            `sequence_length` is a `tf.RaggedTensor`.

        Raises:
            TypeError: If `inputs` has anything but strings, or `parse_special` is not a bool.
            ValueError: If the vocabulary is missing, or an array has two or more dimensions.
        """
        vocabulary = self.pieces
        _check_flag("parse_special", parse_special)
        if tf_data.is_symbolic(inputs):
            return self._tokenize_symbolic(inputs, parse_special)
        texts, batched = read_texts(inputs)
        start = [self.start_token_id] if self.add_bos else []
        end = [self.end_token_id] if self.add_eos else []
        rows = [start + ids + end for ids in vocabulary.encode(texts, parse_special)]
        if self.sequence_length is None:
            rows = [np.array(ids, self.compute_dtype) for ids in rows]
        else:
            rows = [ids[: self.sequence_length] for ids in rows]
            rows, _ = pad_rows(rows, self.sequence_length, self.pad_token_id)
            rows = rows.astype(self.compute_dtype)
        return rows if batched else rows[0]

    def _tokenize_symbolic(self, inputs: Any, parse_special: bool) -> Any:
        if inputs.shape.rank == 1 and self.sequence_length is None:
            return tf_data.map_ragged(
                lambda x: self.tokenize(x, parse_special), inputs, self.compute_dtype
            )
        if inputs.shape.rank not in (0, 1):
            raise ValueError(
                "`inputs` in `Dataset.map` must be a string or a batch of strings. "
                f"Received: inputs={inputs}"
            )
        signature = keras.KerasTensor((self.sequence_length,), self.compute_dtype)
        return tf_data.map_numpy(lambda x: self.tokenize(x, parse_special), inputs, signature)

    def apply_chat_template(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        add_generation_prompt: bool = True,
        tokenize: bool = True,
    ) -> Any:
        """Converts a conversation to the format of Gemma's instruction-tuned models.

        Gemma has no system role. A system message, which must be the first, is added to the
        beginning of the first user turn, followed by an empty line.

        Args:
            messages: Messages `{"role": ..., "content": ...}`, or a list of such lists. After an
                optional system message, the roles alternate between `"user"` and `"assistant"` (or
                `"model"`).
            add_generation_prompt: If True, ends with the beginning of the model's turn. Defaults to
                True.
            tokenize: If True, returns ids. If False, returns a string. Defaults to True.

        Returns:
            Token ids with `<bos>`, as a list of integers. Names of control tokens in the content
            are plain text. Or the string, in which these names cannot be told from control
            tokens. For a list of conversations, a list of either.

        Raises:
            TypeError: If `messages` is not a list of messages, or content is not a string.
            ValueError: If roles do not alternate, a message lacks its role or content, the list is
                empty, or the vocabulary lacks `<start_of_turn>`.

        Example:

        ```python
        import keras_gemma

        tokenizer = keras_gemma.GemmaTokenizer.from_preset("gemma_tiny_en")
        messages = [{"role": "user", "content": "Who's there?"}]
        tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer.apply_chat_template(messages)
        ```
        """
        _check_flag("add_generation_prompt", add_generation_prompt)
        _check_flag("tokenize", tokenize)
        if isinstance(messages, Sequence) and messages and isinstance(messages[0], list | tuple):
            return [
                self.apply_chat_template(chat, add_generation_prompt, tokenize) for chat in messages
            ]
        turns = read_turns(messages)
        if not tokenize:
            return render(turns, self.start_token, add_generation_prompt)
        return self.encode_turns(turns, add_generation_prompt)

    def encode_turns(
        self,
        turns: Sequence[Turn],
        add_generation_prompt: bool = True,
        replies: Mapping[str, Sequence[int]] | None = None,
    ) -> list[int]:
        """Returns the ids of turns. Same arguments as in `text.chat.encode_turns`."""
        return encode_turns(turns, self.pieces, add_generation_prompt, replies)[0]

    def detokenize(self, inputs: Any, skip_special_tokens: bool | None = None) -> str | list[str]:
        """Returns the text of one sequence of ids or a batch. Invalid UTF-8 becomes U+FFFD.

        Args:
            inputs: An id, a 1-D list or array of ids, a 2-D array, or a list of 1-D lists or arrays
                of any lengths. Arrays may be tensors of any framework.
            skip_special_tokens: If True, omits all control tokens. If False, writes their names.
                `None` does the same as SentencePiece and KerasHub: it omits `<bos>`, `<eos>` and
                `<pad>`, writes `<unk>` as ` ⁇ `, and writes the names of others.

        Returns:
            A string, or a list of strings for 2-D inputs. It equals the tokenized text if
            `skip_special_tokens` is False, or `parse_special` was False in `tokenize`.

        Raises:
            ValueError: If an id is out of range, or `inputs` has more than two dimensions.
            TypeError: If ids are not integers, or `skip_special_tokens` is not a bool.
        """
        vocabulary = self.pieces
        if skip_special_tokens is not None:
            _check_flag("skip_special_tokens", skip_special_tokens)
        rows, batched = read_ids(inputs)
        for row in rows:
            invalid = row[(row < 0) | (row >= vocabulary.size)]
            if invalid.size:
                raise ValueError(
                    "`inputs` must be ids in the vocabulary's range "
                    f"[0, {vocabulary.size}). Received: {invalid[:10].tolist()}"
                )
        texts = [vocabulary.decode(row.tolist(), skip_special_tokens) for row in rows]
        return texts if batched else texts[0]

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments. The vocabulary is a base64 string."""
        return {
            **super().get_config(),
            "proto": self.proto and base64.b64encode(self.proto).decode("ascii"),
            "sequence_length": self.sequence_length,
            "add_bos": self.add_bos,
            "add_eos": self.add_eos,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GemmaTokenizer":
        """Returns the tokenizer of a config. A config may have a vocabulary, but not a path."""
        proto = config.get("proto")
        if isinstance(proto, str):
            config = {**config, "proto": decode_base64(proto)}
        return super().from_config(config)

    def save_assets(self, dir_path: str | Path) -> None:
        """Writes the vocabulary to `dir_path`/vocabulary.spm."""
        Path(dir_path, VOCABULARY_FILE).write_bytes(self.pieces.proto)

    def load_assets(self, dir_path: str | Path) -> None:
        """Reads the vocabulary from `dir_path`/vocabulary.spm."""
        self.set_proto(Path(dir_path, VOCABULARY_FILE))

    def load_preset_assets(self, preset_dir: str | Path) -> None:
        """Reads the vocabulary of a local preset directory."""
        self.load_assets(Path(preset_dir, "assets", "tokenizer"))


def check_vocabulary_size(tokenizer: GemmaTokenizer, rows: int) -> None:
    """Raises a ValueError if an embedding with this number of rows lacks one for a token."""
    size = tokenizer.vocabulary_size()
    if size > rows:
        raise ValueError(
            f"The tokenizer has {size} ids, but the backbone's vocabulary_size is {rows}. Use the "
            "tokenizer of the backbone's preset, or a backbone with a larger `vocabulary_size`."
        )


def _check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False. Received: {name}={value!r}")
