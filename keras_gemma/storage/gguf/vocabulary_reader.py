"""Reads the vocabulary of a GGUF file, which is untrusted, as a SentencePiece model."""

import reprlib
from pathlib import Path
from typing import Any

import numpy as np

from keras_gemma.checks import is_integer
from keras_gemma.storage.gguf.header import read_header
from keras_gemma.storage.gguf.layout import EMBEDDING
from keras_gemma.storage.hugging_face.tokenizer_json import serialize_pieces
from keras_gemma.text.pieces import CONTROL, PIECE_TYPES, SPACE, UNKNOWN, UNUSED, USER_DEFINED

CONTROL_TYPES = {"<pad>": CONTROL, "<eos>": CONTROL, "<bos>": CONTROL, "<unk>": UNKNOWN}
"""SentencePiece type of llama.cpp's control tokens that are not plain pieces for SentencePiece."""

MAX_SCORE = 1e38
"""Maximum absolute score of a token: SentencePiece has float32 scores."""

TEMPLATE_MARKS = ("<start_of_turn>", "<end_of_turn>")
"""Texts in every chat template with Gemma's turns."""


def read_tokenizer(path: Path) -> dict[str, Any]:
    header = read_header(path)
    metadata = header.metadata
    keys = [f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type")]
    model = metadata.get("tokenizer.ggml.model")
    missing = [key for key in keys if key not in metadata]
    if missing or not isinstance(model, str) or model != "llama":
        problem = (
            f"lacks {', '.join(missing)}"
            if missing
            else f"has a vocabulary of kind {reprlib.repr(model)}"
        )
        raise ValueError(f"{path} {problem}, but a SentencePiece vocabulary is needed.")
    tokens, scores, types = (metadata[key] for key in keys)
    special = {
        "unk": metadata.get("tokenizer.ggml.unknown_token_id", 3),
        "bos": metadata.get("tokenizer.ggml.bos_token_id", 2),
        "eos": metadata.get("tokenizer.ggml.eos_token_id", 1),
        "pad": metadata.get("tokenizer.ggml.padding_token_id", 0),
    }
    dummy_prefix = metadata.get("tokenizer.ggml.add_space_prefix", False)
    problem = _vocabulary_problem(tokens, scores, types, special, dummy_prefix)
    if problem is not None:
        raise ValueError(f"{path} has a damaged vocabulary: {problem}. Download it again.")
    pieces = []
    for text, score, type in zip(tokens, scores.tolist(), types.tolist(), strict=True):
        if type == CONTROL:
            type = CONTROL_TYPES.get(text, USER_DEFINED)
        elif type == USER_DEFINED:
            text = text.replace(" ", SPACE)
        pieces.append((text, score, type))
    while pieces[-1][2] == UNUSED and len(pieces) > max(special.values()) + 1:
        pieces.pop()  # a row beyond the vocabulary
    if EMBEDDING in header.tensors and len(pieces) > (rows := header.tensors[EMBEDDING].shape[0]):
        raise ValueError(
            f"{path} has {len(pieces)} tokens, but {EMBEDDING} has {rows} rows: the file is "
            "damaged. Download it again."
        )
    return {"proto": serialize_pieces(pieces, special, dummy_prefix)}


def _vocabulary_problem(
    tokens: Any, scores: Any, types: Any, special: dict[str, Any], dummy_prefix: Any
) -> str | None:
    if not isinstance(tokens, list):
        return "tokens must be a list of text"
    for name, array, kinds in (("scores", scores, "fiu"), ("types", types, "iu")):
        if not isinstance(array, np.ndarray) or array.dtype.kind not in kinds:
            return f"{name} must be a list of {'numbers' if 'f' in kinds else 'integers'}"
    if not len(tokens) == len(scores) == len(types):
        return f"it has {len(tokens)} tokens, {len(scores)} scores and {len(types)} types"
    if not (np.abs(scores) <= MAX_SCORE).all():
        return "a score is not a finite number in float32"
    if not np.isin(types, PIECE_TYPES).all():
        return f"types must be {min(PIECE_TYPES)} to {max(PIECE_TYPES)}"
    for name, id in special.items():
        if not is_integer(id) or not 0 <= id < len(tokens):
            return f"the id of {name} is {reprlib.repr(id)}, but it has {len(tokens)} tokens"
    if not isinstance(dummy_prefix, bool):
        return f"add_space_prefix is {reprlib.repr(dummy_prefix)}"
    return None


def find_ignored_part(path: Path) -> str | None:
    """Returns a warning if the file has a chat template without Gemma's turns."""
    template = read_header(path).metadata.get("tokenizer.chat_template")
    if template is None or (
        isinstance(template, str) and all(mark in template for mark in TEMPLATE_MARKS)
    ):
        return None
    return (
        "The file has another chat template, which is not used. Chats have Gemma's turns: pass "
        f"prompts in the model's own format to `generate` instead. Received: {path}"
    )
