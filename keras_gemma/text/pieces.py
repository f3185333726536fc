"""SentencePiece vocabulary: text to ids and back, with and without control tokens.

Adds two things to SentencePiece: the names of control tokens can be read as plain text, and a
literal `▁` is preserved. `export/graph/text.py` is the same in TensorFlow. Knows nothing about
arrays and padding.
"""

import base64
import binascii
import functools
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece

MAX_PATH_LENGTH = 2048
"""Maximum length of a path, in characters. A longer `proto` string is a base64 vocabulary."""

CONTROL_NAMES = re.compile(
    r"<mask>|<2mass>|\[@BOS@\]|\[multimodal\]"
    r"|<unused[0-9]+>"
    r"|<(start|end)_[a-z_]+>"  # <start_of_turn>, <end_of_image>
    r"|<[a-z_]+_soft_token>"  # <image_soft_token>
    r"|<escape>"  # FunctionGemma
    r"|<\|[a-z_]+\|>"  # CodeGemma: <|fim_prefix|>, <|file_separator|>
)
"""Pattern of the control tokens that Gemma's vocabularies have as "user defined" pieces.

`<bos>`, `<eos>`, `<pad>` and `<unk>` have the types "control" and "unknown". Other user-defined
pieces are plain text: runs of newlines and spaces, and HTML tags such as `<h1>`.
"""

SPACE = "▁"
"""Character that replaces the space in SentencePiece's pieces."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = PIECE_TYPES = range(1, 7)
"""Types of SentencePiece's pieces. GGUF has the same numbers."""


class Pieces:
    """Vocabulary of a SentencePiece model, in bytes."""

    def __init__(self, proto: bytes) -> None:
        self.proto = proto
        self.processor = _processor(proto)
        self.size = self.processor.vocab_size()

    @functools.cached_property
    def control_tokens(self) -> dict[str, int]:
        """Ids of the tokens that plain text cannot contain, by name."""
        processor = self.processor
        return {
            name: id
            for id, name in enumerate(self.names())
            if CONTROL_NAMES.fullmatch(name) or processor.is_control(id) or processor.is_unknown(id)
        }

    def names(self) -> list[str]:
        """Returns all pieces in the order of their ids. A space is written as `▁`."""
        return self.processor.id_to_piece(list(range(self.size)))

    def id_or_none(self, name: str) -> int | None:
        """Returns the id of the piece `name`, or `None` if the vocabulary does not have it."""
        id = self.processor.piece_to_id(name)
        return id if self.processor.id_to_piece(id) == name else None

    def encode(self, texts: Sequence[str], parse_special: bool = True) -> list[list[int]]:
        """Returns the ids of each text.

        A literal `▁`, which SentencePiece reads as a space, is encoded as three bytes. Names of
        control tokens become these tokens if `parse_special`, and are plain text otherwise.

        Raises:
            ValueError: If a text has half of a surrogate pair.
        """
        processor, atoms, pattern = self._parsing if parse_special else self._plain
        rows = [pattern.split(text) for text in texts]  # text, atom, text, atom, … text
        between = [text for parts in rows for text in parts[::2]]
        try:
            if len(between) == 1:  # A list starts threads, which take longer than a short text.
                encoded = iter([processor.encode(between[0], out_type=int)])
            else:
                encoded = iter(processor.encode(between, out_type=int))
        except (TypeError, UnicodeEncodeError) as error:  # The type depends on the number of texts.
            raise ValueError(
                "A text must be valid Unicode, without half of a surrogate pair. "
                f"Received: {max(texts, key=has_surrogates)!a:.80}"
            ) from error
        encoded_rows = []
        for parts in rows:
            ids = next(encoded)
            for atom in parts[1::2]:
                ids += atoms[atom] + next(encoded)
            encoded_rows.append(ids)
        return encoded_rows

    @functools.cached_property
    def _parsing(self) -> tuple[Any, ...]:
        return self.processor, *self._atoms_and_pattern(parse_special=True)

    @functools.cached_property
    def _plain(self) -> tuple[Any, ...]:
        return _processor(self.plain_proto), *self._atoms_and_pattern(parse_special=False)

    def _atoms_and_pattern(self, parse_special: bool) -> tuple[Any, ...]:
        atoms = self.atoms(parse_special)
        names = "|".join(map(re.escape, atoms)) or "(?!)"  # (?!) never matches
        return atoms, re.compile(f"({names})")

    def decode(self, ids: list[int], skip_special: bool | None = None) -> str:
        """Returns the text of `ids`. See `GemmaTokenizer.detokenize` for `skip_special`."""
        if skip_special is None:
            return self.processor.decode(ids) if ids else ""
        parts = []
        for special, run in itertools.groupby(ids, self._control_names.__contains__):
            if not special:
                parts.append(self.processor.decode(list(run)))
            elif not skip_special:
                parts.extend(self._control_names[id] for id in run)
        return "".join(parts)

    @functools.cached_property
    def _control_names(self) -> dict[int, str]:
        return {id: name for name, id in self.control_tokens.items()}

    def atoms(self, parse_special: bool) -> dict[str, list[int]]:
        """Returns the strings that are encoded without SentencePiece, with their ids, in the order
        of matching: longest name first."""
        names = sorted(self.control_tokens, key=len, reverse=True) if parse_special else ()
        atoms = {name: [self.control_tokens[name]] for name in names}
        bytes_of_space = [self.id_or_none(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        return atoms if None in bytes_of_space else atoms | {SPACE: bytes_of_space}

    @functools.cached_property
    def plain_proto(self) -> bytes:
        """SentencePiece model that reads the names of control tokens as plain text.

        SentencePiece matches user-defined pieces such as `<start_of_turn>` in a text, but never
        pieces of type CONTROL. In this model, all control tokens have that type.
        """
        from sentencepiece import sentencepiece_model_pb2 as protobuf  # rarely needed

        model = protobuf.ModelProto.FromString(self.proto)
        for id in self.control_tokens.values():
            if not self.processor.is_unknown(id):
                model.pieces[id].type = protobuf.ModelProto.SentencePiece.CONTROL
        return model.SerializeToString()


def has_surrogates(text: str) -> bool:
    """Returns True if a string has half of a surrogate pair, which UTF-8 cannot encode."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def read_proto(proto: str | Path | bytes) -> bytes:
    """Returns the bytes of a vocabulary that is a path, bytes or a base64 string."""
    if isinstance(proto, bytes):
        return proto
    if not isinstance(proto, str | Path):
        raise TypeError(
            "`proto` must be a path, bytes, a base64 string or None. "
            f"Received: proto of type {type(proto).__name__}"
        )
    if isinstance(proto, str) and len(proto) > MAX_PATH_LENGTH:
        return decode_base64(proto)
    path = Path(proto)
    if not path.is_file():
        raise FileNotFoundError(
            "No vocabulary file at `proto`. Pass the path of a vocabulary.spm or "
            f"tokenizer.model. Received: proto={str(proto)!r}"
        )
    return path.read_bytes()


def decode_base64(proto: str) -> bytes:
    """Returns the bytes of a base64 string."""
    try:
        return base64.b64decode(proto, validate=True)
    except binascii.Error as error:
        raise ValueError(
            "`proto` is not valid base64. Pass a path to the constructor, not in a config. "
            f"Received: proto={proto[:40]!r} ({len(proto)} characters)"
        ) from error


def _processor(proto: bytes) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(proto)
    except RuntimeError as error:
        raise ValueError(
            "`proto` must be a SentencePiece model, such as the file vocabulary.spm or "
            "tokenizer.model of a Gemma checkpoint. "
            f"Received: {len(proto)} bytes that begin with {proto[:16]!r}"
        ) from error
    return processor
