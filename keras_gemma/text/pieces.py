"""The pieces of a SentencePiece vocabulary: text to ids and back, with control tokens or without.

SentencePiece splits the text; what is added here is the choice between a control token and its
name written in a text, and a literal `▁` that stays one. Knows no arrays and no batches.
"""

import base64
import binascii
import functools
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

LONGEST_PATH = 2048
"""A longer `proto` string is no path but a vocabulary in base64."""

CONTROL_NAMES = re.compile(
    r"<mask>|<2mass>|\[@BOS@\]|\[multimodal\]"
    r"|<unused[0-9]+>"
    r"|<(start|end)_[a-z_]+>"  # <start_of_turn>, <end_of_image>
    r"|<[a-z_]+_soft_token>"  # <image_soft_token>
    r"|<\|[a-z_]+\|>"  # CodeGemma: <|fim_prefix|>, <|file_separator|>
)
"""Control tokens that Gemma's vocabularies hold as pieces of a text ("user defined").

`<bos>`, `<eos>`, `<pad>` and `<unk>` have types of their own there. Runs of newlines and spaces,
and HTML tags such as `<h1>`, are pieces of a text too, and are text.
"""

SPACE = "▁"
"""How SentencePiece writes the space in its pieces."""


class Pieces:
    """A SentencePiece vocabulary.

    Args:
        proto: the SentencePiece model, as bytes.

    Raises:
        ValueError: `proto` is no SentencePiece model.

    Example:

    ```python
    from keras_gemma import GemmaTokenizer
    from keras_gemma.text.pieces import Pieces

    pieces = Pieces(GemmaTokenizer.from_preset("gemma_tiny_en").proto)
    pieces.encode(["<bos>"])                       # [[2]]
    pieces.encode(["<bos>"], parse_special=False)  # the ids of five characters
    ```
    """

    def __init__(self, proto: bytes) -> None:
        self.proto = proto
        self.processor = _processor(proto)
        self.size = self.processor.vocab_size()

    @functools.cached_property
    def control_tokens(self) -> dict[str, int]:
        """The tokens that no plain text holds, and their ids."""
        processor = self.processor
        return {
            name: id
            for id, name in enumerate(self.names())
            if CONTROL_NAMES.fullmatch(name) or processor.is_control(id) or processor.is_unknown(id)
        }

    def names(self) -> list[str]:
        """All pieces, in the order of their ids. A space is written `▁`."""
        return self.processor.id_to_piece(list(range(self.size)))

    def id_or_none(self, name: str) -> int | None:
        """The id of the piece `name`, or None where there is none."""
        id = self.processor.piece_to_id(name)
        return id if self.processor.id_to_piece(id) == name else None

    def encode(self, texts: Sequence[str], parse_special: bool = True) -> list[list[int]]:
        """The ids of each text: with `parse_special`, those of the control tokens named in it.

        A literal `▁`, which SentencePiece would read as a space, becomes its three bytes.
        """
        return (self._parsing if parse_special else self._plain).encode(texts)

    def decode(self, ids: list[int], skip_special: bool | None = None) -> str:
        """The text of `ids`; see `GemmaTokenizer.detokenize` for `skip_special`."""
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
        """The strings of a text that SentencePiece is not shown, and the ids that they become.

        In the order in which they are looked for, the longest name first.
        """
        names = sorted(self.control_tokens, key=len, reverse=True) if parse_special else ()
        return {name: [self.control_tokens[name]] for name in names} | self._literal_space()

    @functools.cached_property
    def plain_proto(self) -> bytes:
        """The SentencePiece model for text in which no piece is a control token.

        SentencePiece itself reads `<start_of_turn>` in a text as the token. It never does so with
        pieces of the type CONTROL, so here all control tokens have that type.
        """
        from sentencepiece import sentencepiece_model_pb2 as protobuf  # seldom needed

        model = protobuf.ModelProto.FromString(self.proto)
        for id in self.control_tokens.values():
            if not self.processor.is_unknown(id):
                model.pieces[id].type = protobuf.ModelProto.SentencePiece.CONTROL
        return model.SerializeToString()

    @functools.cached_property
    def _parsing(self) -> "_Splitter":
        return _Splitter(self.processor, self.atoms(parse_special=True))

    @functools.cached_property
    def _plain(self) -> "_Splitter":
        return _Splitter(_processor(self.plain_proto), self.atoms(parse_special=False))

    def _literal_space(self) -> dict[str, list[int]]:
        """A literal `▁` and the ids of its bytes, where the vocabulary has them."""
        ids = [self.id_or_none(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        return {} if None in ids else {SPACE: ids}


class _Splitter:
    """SentencePiece, and the strings that it is not shown, `atoms`, with the ids they have."""

    def __init__(
        self, processor: sentencepiece.SentencePieceProcessor, atoms: dict[str, list[int]]
    ) -> None:
        self.processor = processor
        self.atoms = atoms
        names = "|".join(map(re.escape, atoms))
        self.pattern = re.compile(f"({names or '(?!)'})")  # (?!) is found nowhere

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        parts = [self.pattern.split(text) for text in texts]  # text, atom, text, atom, … text
        between = [text for row in parts for text in row[::2]]
        encoded = iter(self._encode(between))
        rows = []
        for row in parts:
            ids = next(encoded)
            for atom in row[1::2]:
                ids += self.atoms[atom]
                ids += next(encoded)
            rows.append(ids)
        return rows

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if len(texts) == 1:  # a list is shared out to threads, which costs more than a short text
            return [self.processor.encode(texts[0], out_type=int)]
        return self.processor.encode(texts, out_type=int)


def read_proto(proto: str | Path | bytes) -> bytes:
    """The bytes of a vocabulary given as a path, bytes or a base64 string.

    Raises TypeError, FileNotFoundError, or ValueError for what is no base64.
    """
    if isinstance(proto, bytes):
        return proto
    if not isinstance(proto, str | Path):
        raise TypeError(
            "`proto` must be a path, bytes, a base64 string or None. "
            f"Received: proto of type {type(proto).__name__}"
        )
    if isinstance(proto, str) and len(proto) > LONGEST_PATH:
        return decode_base64(proto)
    path = Path(proto)
    if not path.is_file():
        raise FileNotFoundError(
            "No vocabulary file at `proto`. Give the path of a vocabulary.spm or "
            f"tokenizer.model. Received: proto={str(proto)!r}"
        )
    return path.read_bytes()


def decode_base64(proto: str) -> bytes:
    """The bytes of a base64 string, or ValueError."""
    try:
        return base64.b64decode(proto, validate=True)
    except binascii.Error as error:
        raise ValueError(
            "`proto` is no vocabulary in base64. Give a path to the constructor, not to a config. "
            f"Received: proto={proto[:40]!r} ({len(proto)} characters)"
        ) from error


def _processor(proto: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        if proto:
            return sentencepiece.SentencePieceProcessor(model_proto=proto)
    except RuntimeError as error:
        raise _no_model(proto) from error
    raise _no_model(proto)


def _no_model(proto: bytes) -> ValueError:
    return ValueError(
        "`proto` must be a SentencePiece model, such as the file vocabulary.spm or "
        "tokenizer.model of a Gemma checkpoint. "
        f"Received: {len(proto)} bytes that begin with {proto[:16]!r}"
    )
