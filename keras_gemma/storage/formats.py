"""File names of each format, so that a save never leaves two models in one folder.

Knows only names, as paths relative to the folder. Other files belong to the user.
"""

import fnmatch
from pathlib import Path

from keras_gemma.storage.hugging_face import layout as hugging_face_layout
from keras_gemma.storage.keras_preset import layout as keras_layout

KERAS = (
    keras_layout.CONFIG,
    keras_layout.TOKENIZER,
    keras_layout.PREPROCESSOR,
    keras_layout.TASK,
    keras_layout.METADATA,
    keras_layout.VOCABULARY,
    keras_layout.WEIGHTS,
    keras_layout.WEIGHTS_INDEX,
    keras_layout.SHARD_PATTERN,
)
HUGGING_FACE = (
    hugging_face_layout.CONFIG,
    hugging_face_layout.GENERATION_CONFIG,
    hugging_face_layout.VOCABULARY,
    hugging_face_layout.TOKENIZER,
    hugging_face_layout.TOKENIZER_CONFIG,
    hugging_face_layout.SPECIAL_TOKENS,
    hugging_face_layout.CHAT_TEMPLATE,
    hugging_face_layout.WEIGHTS,
    hugging_face_layout.WEIGHTS_INDEX,
    hugging_face_layout.SHARD_PATTERN,
)

_HUGGING_FACE_MARKERS = {
    hugging_face_layout.CONFIG: b'"model_type"',
    hugging_face_layout.TOKENIZER: b'"added_tokens"',
}
"""Content that distinguishes Hugging Face's file from Keras's of the same name."""


def is_model_file(name: str) -> bool:
    """Returns True if a file of this name is part of a model in either format."""
    return _matches(name, KERAS + HUGGING_FACE)


def check_no_hugging_face(folder: Path) -> None:
    """Checks that saving part of a Keras preset would not mix it with a Hugging Face checkpoint.

    Raises:
        ValueError: If `folder` holds files of such a checkpoint. The message names them.
    """
    if not folder.is_dir():
        return
    names = [
        path.name
        for path in sorted(folder.iterdir())
        if path.is_file()
        and _matches(path.name, HUGGING_FACE)
        and (
            path.name not in _HUGGING_FACE_MARKERS
            or _HUGGING_FACE_MARKERS[path.name] in path.read_bytes()
        )
    ]
    if names:
        raise ValueError(
            "`preset_dir` holds a Hugging Face checkpoint, and a part of a Keras preset would mix "
            "with it. Save to a separate folder, or replace the checkpoint with a whole model: "
            f"`lm.save_to_preset(...)`. Received: preset_dir={str(folder)!r}, which holds "
            f"{', '.join(names)}"
        )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(
        fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")
        for pattern in patterns
    )
