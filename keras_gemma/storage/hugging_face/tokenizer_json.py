"""Converts Hugging Face's tokenizer.json to a SentencePiece model and back, for Gemma's tokenizers.

SentencePiece merges the two neighbors whose joint piece has the highest score. tokenizer.json
lists the merges by priority. The two are equivalent if the pieces have the same order, and every
split of a piece into two parts is listed. Any other tokenizer.json is refused, because its ids
would differ.
"""

import gc
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from keras_gemma.storage.files import read_json
from keras_gemma.text.pieces import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED

SPECIAL = {"unk": "<unk>", "bos": "<bos>", "eos": "<eos>", "pad": "<pad>"}
TURNS = ("<start_of_turn>", "<end_of_turn>")
"""Additional special tokens in Hugging Face's files, if the vocabulary has them."""

BPE = 2
"""SentencePiece's `model_type` of byte-pair encoding."""

_BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
_TAB, _TAB_BYTE = "\t", _BYTE_PIECES[9]

_NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PRE_TOKENIZER = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}
_MODEL = {
    "type": "BPE",
    "dropout": None,
    "unk_token": SPECIAL["unk"],
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": True,
    "byte_fallback": True,
    "ignore_merges": False,
}


def is_tokenizer_json(content: dict[str, Any]) -> bool:
    """Returns True if `content` is Hugging Face's tokenizer.json.

    A Keras preset has another file of that name.
    """
    return "model" in content and "added_tokens" in content


def read_tokenizer_json(path: Path, rows: int | None = None) -> bytes:
    """Returns the SentencePiece model that gives the same ids as the tokenizer.json in `path`.

    `rows` is the number of embedding rows of the model. Added tokens with higher ids are dropped,
    such as Gemma 3's `<image_soft_token>`, for which a text model has no row. `None` keeps them.

    Garbage collection is paused. Recent files store Gemma's 580,604 merges as lists, which the
    collector would scan again and again: about 1.3 s.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return _to_sentencepiece(read_json(path), path, rows)
    finally:
        if was_enabled:
            gc.enable()


def _to_sentencepiece(content: dict[str, Any], path: Path, rows: int | None) -> bytes:
    problems = _other_kind(content)
    if problems:
        raise ValueError(
            f"{path} is not a tokenizer of Gemma's kind: {'; '.join(problems)}. Fetch "
            "tokenizer.model from the checkpoint's repository, and put it next to tokenizer.json."
        )
    ids = content["model"]["vocab"]
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    texts = _texts({**ids, **added}, path)
    while rows is not None and len(texts) > rows and texts[-1] in added:
        del added[texts.pop()]
    distinct = set(texts)
    missing = [text for text in (*SPECIAL.values(), *_BYTE_PIECES) if text not in distinct]
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} tokens that Gemma's tokenizer has: "
            f"{', '.join(missing[:8])}. Fetch tokenizer.model from the checkpoint's repository."
        )
    types = dict.fromkeys(texts, NORMAL) | dict.fromkeys(added, USER_DEFINED)
    types |= dict.fromkeys(_BYTE_PIECES, BYTE) | dict.fromkeys(SPECIAL.values(), CONTROL)
    types[SPECIAL["unk"]] = UNKNOWN
    pairs = _pairs(content["model"]["merges"], path)
    types |= dict.fromkeys(_merged_runs(content["added_tokens"], pairs), NORMAL)
    ranks = _ranks(pairs, types, path)

    pieces = [
        (text, -ranks.get(text, len(texts)) if types[text] == NORMAL else 0, types[text])
        for text in texts
    ]
    return serialize_pieces(pieces, {name: texts.index(text) for name, text in SPECIAL.items()})


def serialize_pieces(
    pieces: list[tuple[str, float, int]], special: dict[str, int], dummy_prefix: bool = False
) -> bytes:
    """Returns a SentencePiece model of Gemma's kind.

    Args:
        pieces: Text, score and type of each piece.
        special: Ids of the pieces `"unk"`, `"bos"`, `"eos"` and `"pad"`.
        dummy_prefix: If True, texts begin with a space.
    """
    model = _protobuf().ModelProto()
    add_piece = model.pieces.add
    for text, score, type in pieces:
        add_piece(piece=text, score=score, type=type)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = BPE
    trainer.vocab_size = len(pieces)
    trainer.byte_fallback = True
    for name, id in special.items():
        setattr(trainer, f"{name}_id", id)
        setattr(trainer, f"{name}_piece", pieces[id][0])
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = dummy_prefix
    normalizer.remove_extra_whitespaces = False
    return model.SerializeToString()


def write_tokenizer_json(proto: bytes, add_start_token: bool = True) -> dict[str, Any]:
    """Returns the content of a tokenizer.json that gives the same ids as a SentencePiece model.

    If `add_start_token` is True, each text begins with `<bos>`.
    """
    model = _protobuf().ModelProto.FromString(proto)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    differences = {
        "model_type": (trainer.model_type, BPE),
        "byte_fallback": (trainer.byte_fallback, True),
        "precompiled_charsmap": (normalizer.precompiled_charsmap[:8], b""),
        "add_dummy_prefix": (normalizer.add_dummy_prefix, False),
        "remove_extra_whitespaces": (normalizer.remove_extra_whitespaces, False),
        "escape_whitespaces": (normalizer.escape_whitespaces, True),
    }
    problems = [
        f"{setting}={value!r}, not {expected!r}"
        for setting, (value, expected) in differences.items()
        if value != expected
    ]
    if problems:
        raise ValueError(
            "`proto` is not of Gemma's kind, and no tokenizer.json is equivalent to it: "
            f"{'; '.join(problems)}. Use Gemma's vocabulary, or one from `train_vocabulary`."
        )
    pieces = model.pieces
    special = (*SPECIAL.values(), *TURNS)
    added = [
        {
            "id": id,
            "content": piece.piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            # Runs of spaces are matched after spaces have become ▁; control tokens before.
            "normalized": piece.piece not in special,
            "special": piece.piece in special,
        }
        for id, piece in enumerate(pieces)
        if piece.type in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    vocabulary = {piece.piece: id for id, piece in enumerate(pieces)}
    if _TAB not in vocabulary:  # merges need a name for the character, as in published files
        vocabulary = {_TAB if t == _TAB_BYTE else t: id for t, id in vocabulary.items()}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _NORMALIZER,
        "pre_tokenizer": _PRE_TOKENIZER,
        "post_processor": _post_processor(vocabulary[SPECIAL["bos"]]) if add_start_token else None,
        "decoder": _DECODER,
        "model": {**_MODEL, "vocab": vocabulary, "merges": _merges(pieces)},
    }


def _post_processor(id: int) -> dict[str, Any]:
    """Returns the post-processor that adds `<bos>` before a text, or before both of a pair."""
    bos = SPECIAL["bos"]
    first, second = (
        [{"SpecialToken": {"id": bos, "type_id": i}}, {"Sequence": {"id": name, "type_id": i}}]
        for i, name in enumerate("AB")
    )
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": first + second,
        "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}},
    }


def _merges(pieces: Any) -> list[str]:
    """Returns all splits of pieces into two parts, the piece with the highest score first."""
    parts = _parts({piece.piece: piece.type for piece in pieces})
    order = sorted((-piece.score, id) for id, piece in enumerate(pieces) if piece.type == NORMAL)
    return [f"{a} {b}" for _, id in order for a, b in _splits(pieces[id].piece, parts)]


def _parts(types: dict[str, int]) -> set[str]:
    """Returns the parts that SentencePiece merges: normal pieces, and characters of any kind."""
    parts = {text for text, type in types.items() if type == NORMAL}
    return parts | (set("".join(parts)) - types.keys())


def _splits(text: str, parts: set[str]) -> Iterator[tuple[str, str]]:
    """Yields the splits of `text` into two `parts`, the shortest left part first."""
    for i in range(1, len(text)):
        if text[:i] in parts and text[i:] in parts:
            yield text[:i], text[i:]


def _merged_runs(tokens: list[dict[str, Any]], pairs: list[list[str]]) -> list[str]:
    """Returns the added tokens of spaces that are merged from shorter ones, not matched as a whole.

    A token that is not `normalized` is searched before spaces become ▁, so a run of ▁ never
    matches, and the merges decide. Those of Gemma 2 double a run: 33 spaces become 16 and 17, not
    31 and 2 as in its tokenizer.model. Those of Gemma 3 extend a run to the longest piece first,
    which equals a match of the whole piece.
    """
    merged = (a + b for a, b in pairs)
    lengths = list(dict.fromkeys(len(text) for text in merged if not text.strip(SPACE)))
    if len(lengths) > 1 and lengths == sorted(lengths, reverse=True):
        return []
    runs = (token["content"] for token in tokens if not token.get("normalized", True))
    return [text for text in runs if text and not text.strip(SPACE)]


def _ranks(pairs: list[list[str]], types: dict[str, int], path: Path) -> dict[str, int]:
    """Returns, for each merged piece, the number of pieces that are merged before it."""
    ranks: dict[str, int] = {}
    listed = {text: 0 for text, type in types.items() if type == NORMAL}  # bit i: split after i
    latest = None
    apart = []
    for a, b in pairs:
        text = a + b
        if text not in listed:
            continue
        listed[text] |= 1 << len(a)
        if text != latest:
            if text in ranks:
                apart.append(text)
            else:
                ranks[text] = len(ranks)
            latest = text
    parts = _parts(types)
    unlisted = dict.fromkeys(
        text
        for text, splits in listed.items()
        for i in range(1, len(text))
        if not splits >> i & 1 and text[:i] in parts and text[i:] in parts
    )
    if apart or unlisted:
        raise ValueError(
            f"{path} has merges that no scores of pieces can express: SentencePiece puts a piece "
            "together from any two parts, all at one rank. These pieces differ: "
            f"{', '.join(map(repr, [*unlisted, *apart][:8]))}. Fetch tokenizer.model from the "
            "checkpoint's repository, and put it next to tokenizer.json."
        )
    return ranks


def _pairs(merges: list[Any], path: Path) -> list[list[str]]:
    """Returns the merges as pairs, from either spelling: `"a b"` or `["a", "b"]`."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    wrong = [pair for pair in pairs if len(pair) != 2]
    if wrong:
        raise ValueError(
            f"{path} has {len(wrong)} merges that do not have two parts, such as {wrong[0]!r}. "
            "Fetch it again."
        )
    return pairs


def _texts(ids: dict[str, int], path: Path) -> list[str]:
    """Returns the pieces in the order of their ids, which must be 0, 1, 2 and so on."""
    if _TAB_BYTE not in ids and ids.get(_TAB) == ids.get(_BYTE_PIECES[8], -2) + 1:
        # Published files name the tab's byte by its character, so that merges can use it.
        ids = {_TAB_BYTE if text == _TAB else text: id for text, id in ids.items()}
    elif ids.get(_TAB, -1) == ids.get(_TAB_BYTE):
        ids = {text: id for text, id in ids.items() if text != _TAB}
    texts = {id: text for text, id in ids.items()}
    if len(texts) != len(ids) or set(texts) != set(range(len(texts))):
        raise ValueError(
            f"{path} must give each of its {len(ids)} tokens a unique id, from 0 to "
            f"{len(ids) - 1}. Fetch tokenizer.model from the checkpoint's repository instead."
        )
    return [texts[id] for id in range(len(texts))]


def _protobuf() -> ModuleType:
    """Returns SentencePiece's classes for its model files."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ImportError(
            "tokenizer.json needs the package protobuf. Install it with `pip install protobuf`, or "
            "use tokenizer.model."
        ) from error
    return sentencepiece_model_pb2


def _other_kind(content: dict[str, Any]) -> list[str]:
    """Returns the differences between `content` and Gemma's tokenizer.json."""
    model = content.get("model")
    if not is_tokenizer_json(content) or not isinstance(model, dict):
        return ["it lacks `model` and `added_tokens`"]
    kind = model.get("type")
    if kind != "BPE":
        return [f"its model is {kind!r}, not 'BPE'"]
    tokens = content["added_tokens"]
    if not (
        isinstance(model.get("vocab"), dict)
        and isinstance(model.get("merges"), list)
        and set(map(type, model["merges"])) <= {str, list}
        and isinstance(tokens, list)
        and all(isinstance(token, dict) and {"id", "content"} <= set(token) for token in tokens)
    ):
        return ["its vocab, merges or added_tokens are malformed"]
    problems = [
        f"model.{key} is {model[key]!r}, not {_MODEL[key]!r}"
        for key in _MODEL
        # None, "" and False all disable a setting; so does a missing key, except byte_fallback.
        if (model.get(key) or None) != (_MODEL[key] or None)
        and (key in model or key == "byte_fallback")
    ]
    for key, accepted in (
        ("normalizer", (_NORMALIZER,)),
        ("pre_tokenizer", (None, _PRE_TOKENIZER)),
        ("decoder", (None, _DECODER)),
    ):
        if content.get(key) not in accepted:
            problems.append(f"its {key} is {content.get(key)!r}")
    contextual = [
        token["content"]
        for token in tokens
        if any(token.get(flag) for flag in ("single_word", "lstrip", "rstrip"))
    ]
    if contextual:
        problems.append(f"tokens that depend on their neighbors: {', '.join(contextual[:8])}")
    return problems
