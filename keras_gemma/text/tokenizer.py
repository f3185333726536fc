"""`GemmaTokenizer`: strings to token ids and back, by a SentencePiece vocabulary.

Works on the host with numpy alone, whatever the backend. Knows neither prompts nor padding masks
(`preprocessor.py`), and no file but the vocabulary's own.
"""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_gemma import tf_data
from keras_gemma.presettable import Presettable
from keras_gemma.text.chat import Message, Turn, encode_turns, read_turns, render
from keras_gemma.text.inputs import as_str, pad_rows, read_ids, read_texts
from keras_gemma.text.pieces import Pieces, decode_base64, read_proto

VOCABULARY_FILE = "vocabulary.spm"


@keras.saving.register_keras_serializable(package="keras_gemma")
class GemmaTokenizer(Presettable, keras.layers.Layer):
    """Gemma's tokenizer: strings to ids when called, ids to strings by `detokenize`.

    Args:
        proto: the SentencePiece model as a path, as bytes or as a base64 string; None where
            `load_assets` or `set_proto` brings it later.
        dtype: of the ids, an integer type.
        sequence_length: where given, ids are cut and padded to this many tokens.
        add_bos: whether ids start with `<bos>`. Leave it to the preprocessor where there is one.
        add_eos: whether ids end with `<eos>`; cut off where the text is too long.
        **kwargs: `name` and `trainable`, as of every Keras layer.

    Attributes:
        start_token, end_token, pad_token: `"<bos>"`, `"<eos>"`, `"<pad>"`.
        start_token_id, end_token_id, pad_token_id: their ids; None without a vocabulary.
        end_of_turn_token_id: of `<end_of_turn>`; None where the vocabulary has no such piece.

    Raises:
        FileNotFoundError: no file at `proto`.
        ValueError: `proto` is no SentencePiece model, or lacks a special token.

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
        if sequence_length is not None and sequence_length < 1:
            raise ValueError(
                "`sequence_length` must be positive, or None for ids of any length. "
                f"Received: sequence_length={sequence_length!r}"
            )
        self.sequence_length = sequence_length
        self.add_bos = add_bos
        self.add_eos = add_eos
        self.built = True
        self.set_proto(proto)

    # The vocabulary.

    def set_proto(self, proto: str | Path | bytes | None) -> None:
        """Take another vocabulary: a path, bytes, a base64 string, or None for none."""
        self.proto = self._pieces = None
        self.start_token_id = self.end_token_id = self.pad_token_id = None
        self.end_of_turn_token_id = None
        if proto is None:
            return
        pieces = Pieces(read_proto(proto))
        for token in self.special_tokens:
            if pieces.id_or_none(token) is None:
                raise ValueError(
                    f"`proto` must hold the special tokens {self.special_tokens}, but {token!r} "
                    "is missing. Give Gemma's own vocabulary, or one of `train_vocabulary`. "
                    f"Received: a vocabulary of {pieces.size} pieces"
                )
        self.proto = pieces.proto
        self._pieces = pieces
        self.start_token_id = pieces.id_or_none(self.start_token)
        self.end_token_id = pieces.id_or_none(self.end_token)
        self.pad_token_id = pieces.id_or_none(self.pad_token)
        self.end_of_turn_token_id = pieces.id_or_none("<end_of_turn>")

    @property
    def pieces(self) -> Pieces:
        """The vocabulary itself; ValueError where there is none yet."""
        self._check_vocabulary()
        return self._pieces

    def _check_vocabulary(self) -> None:
        if self._pieces is None:
            raise ValueError(
                f"The tokenizer {self.name!r} has no vocabulary yet. Create it with `proto=...`, "
                "by `GemmaTokenizer.from_preset(...)`, or call `load_assets(directory)` on it."
            )

    def vocabulary_size(self) -> int:
        """The number of token ids, V."""
        return self.pieces.size

    def get_vocabulary(self) -> list[str]:
        """All pieces, in the order of their ids. A space is written `▁`."""
        return self.pieces.names()

    def id_to_token(self, id: int) -> str:
        """The piece of an id; ValueError where the id is out of range."""
        if not 0 <= id < self.vocabulary_size():
            raise ValueError(
                f"`id` must be in the vocabulary's range [0, {self.vocabulary_size()}). "
                f"Received: id={id}"
            )
        return self.pieces.processor.id_to_piece(int(id))

    def token_to_id(self, token: str | bytes) -> int:
        """The id of a piece; the id of `<unk>` where the vocabulary has no such piece."""
        return self.pieces.processor.piece_to_id(as_str(token))

    @property
    def special_tokens(self) -> list[str]:
        """The tokens that are no part of a text: start, end and padding."""
        return [self.start_token, self.end_token, self.pad_token]

    @property
    def special_token_ids(self) -> list[int]:
        """The ids of `special_tokens`."""
        self._check_vocabulary()
        return [self.start_token_id, self.end_token_id, self.pad_token_id]

    @property
    def stop_token_ids(self) -> list[int]:
        """The ids that end a generated text: of `<eos>`, and of `<end_of_turn>` if there is one."""
        self._check_vocabulary()
        ids = [self.end_token_id, self.end_of_turn_token_id]
        return [id for id in ids if id is not None]

    # Strings to ids.

    def __call__(self, inputs: Any, parse_special: bool = True) -> Any:
        """`tokenize`. Strings are no tensors, so nothing of Keras's own call applies."""
        return self.call(inputs, parse_special)

    def call(self, inputs: Any, parse_special: bool = True) -> Any:
        """`tokenize`."""
        return self.tokenize(inputs, parse_special)

    def encode(self, texts: Sequence[str], parse_special: bool = True) -> list[list[int]]:
        """The bare ids of each text, without the `<bos>`, `<eos>` and padding of `tokenize`.

        Args:
            texts: a list, tuple or 1-D array of strings.
            parse_special: as in `tokenize`.

        Raises:
            TypeError: something else than a list of strings.
            ValueError: no vocabulary yet.
        """
        vocabulary = self.pieces
        _check_flag("parse_special", parse_special)
        texts, batched = read_texts(texts)
        if not batched:
            raise TypeError(f"`texts` must be a list of strings. Received: texts={texts[0]!r:.80}")
        return vocabulary.encode(texts, parse_special)

    def tokenize(self, inputs: Any, parse_special: bool = True) -> Any:
        """The ids of one text or of many.

        Control tokens written in a text, such as `<start_of_turn>` or `<bos>`, become their ids.
        Pass `parse_special=False` for text of which that is not wanted, such as what a user
        typed: no text gives the id of a control token then.

        Args:
            inputs: a string, or a list, tuple or 1-D array of B strings; also string tensors,
                inside `tf.data.Dataset.map` too.
            parse_special: False reads the names of control tokens as plain text.

        Returns:
            int [T] for one string; for many a list of B such arrays, or one int
            [B, sequence_length] where `sequence_length` is set.

        Raises:
            TypeError: something else than strings, or `parse_special` is no bool.
            ValueError: no vocabulary yet, an array of two or more dimensions, or in
                `Dataset.map` a batch without a `sequence_length`.
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
        if inputs.shape.rank != 0 and self.sequence_length is None:
            raise ValueError(
                "A batch of strings in `Dataset.map` needs ids of one length: create the "
                "tokenizer with `sequence_length=...`, or map it before `batch`. "
                f"Received: inputs={inputs}"
            )
        signature = keras.KerasTensor((self.sequence_length,), self.compute_dtype)
        return tf_data.map_numpy(lambda x: self.tokenize(x, parse_special), inputs, signature)

    # Conversations.

    def apply_chat_template(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        add_generation_prompt: bool = True,
        tokenize: bool = True,
    ) -> Any:
        """A conversation as the text, or the ids, that Gemma's instruct models were trained on.

        They know no system role: a system message, which must be the first, is put at the head of
        the first user turn, with an empty line between.

        Args:
            messages: `{"role", "content"}` each; after a system message, if there is one, the
                roles alternate between `"user"` and `"assistant"` (or `"model"`). Or a list of
                such lists.
            add_generation_prompt: end with the beginning of the model's turn.
            tokenize: False gives the string.

        Returns:
            The ids, `<bos>` among them, to pass to `generate` in a list: a list of integers, in
            which content gives no control token, whatever is written in it. Or the string, where
            that cannot be told. For a list of conversations, a list of these.

        Raises:
            TypeError: no messages, or content that is no string.
            ValueError: roles that do not alternate, a message without role or content, an empty
                list, or a vocabulary without `<start_of_turn>`.

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
        ids, _ = encode_turns(turns, self.pieces, add_generation_prompt, replies)
        return ids

    # Ids to strings.

    def detokenize(self, inputs: Any, skip_special_tokens: bool | None = None) -> str | list[str]:
        """The text of one sequence of ids, or of many. Bytes that are not UTF-8 are U+FFFD.

        Args:
            inputs: an id, a 1-D list or array of them, a 2-D array, or a list of 1-D lists or
                arrays of any lengths. Arrays may be tensors of any framework.
            skip_special_tokens: True writes all control tokens as nothing, False writes all by
                their names. None does what SentencePiece and KerasHub do: `<bos>`, `<eos>` and
                `<pad>` are nothing, `<unk>` is ` ⁇ `, and `<start_of_turn>` is its name.

        Returns:
            a string, or a list of strings for 2-D inputs. Of ids from `tokenize`, it is the very
            text where `skip_special_tokens` is False, or the text was not parsed.

        Raises:
            ValueError: an id out of range, or more than two dimensions.
            TypeError: ids that are not integers, or `skip_special_tokens` is no bool.
        """
        vocabulary = self.pieces
        if skip_special_tokens is not None:
            _check_flag("skip_special_tokens", skip_special_tokens)
        rows, batched = read_ids(inputs)
        for row in rows:
            wrong = row[(row < 0) | (row >= vocabulary.size)]
            if wrong.size:
                raise ValueError(
                    "`inputs` must be ids in the vocabulary's range "
                    f"[0, {vocabulary.size}). Received: {wrong[:10].tolist()}"
                )
        texts = [vocabulary.decode(row.tolist(), skip_special_tokens) for row in rows]
        return texts if batched else texts[0]

    # Saving.

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments; the vocabulary as a base64 string."""
        proto = None if self.proto is None else base64.b64encode(self.proto).decode("ascii")
        return {
            **super().get_config(),
            "proto": proto,
            "sequence_length": self.sequence_length,
            "add_bos": self.add_bos,
            "add_eos": self.add_eos,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GemmaTokenizer":
        """The tokenizer of a `get_config`. A stored config may hold a vocabulary, but no path."""
        proto = config.get("proto")
        if isinstance(proto, str):
            config = {**config, "proto": decode_base64(proto)}
        return super().from_config(config)

    def save_assets(self, dir_path: str | Path) -> None:
        """Write the vocabulary to `dir_path`/vocabulary.spm."""
        self._check_vocabulary()
        Path(dir_path, VOCABULARY_FILE).write_bytes(self.proto)

    def load_assets(self, dir_path: str | Path) -> None:
        """Read the vocabulary from `dir_path`/vocabulary.spm."""
        self.set_proto(Path(dir_path, VOCABULARY_FILE))

    def load_preset_assets(self, preset_dir: str | Path) -> None:
        """Read the vocabulary of a preset's directory on this machine."""
        self.load_assets(Path(preset_dir, "assets", "tokenizer"))


def _check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False. Received: {name}={value!r}")
