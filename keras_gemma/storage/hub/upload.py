"""Uploads a preset's folder to Kaggle or Hugging Face with their own clients.

Checks the folder and the address before the first byte is sent. Knows which files belong in a
published preset, but no format. The clients handle credentials, progress and resumption; they are
imported only for an upload.
"""

import glob
import re
from pathlib import Path

from keras_gemma.config import GemmaConfig
from keras_gemma.quantization import to_config
from keras_gemma.storage.files import within
from keras_gemma.storage.formats import CONFIG, Format, format_of, open_checked
from keras_gemma.storage.hub.errors import HUGGING_FACE_TOKEN, KAGGLE_TOKEN, UPLOAD, advice
from keras_gemma.text.tokenizer import GemmaTokenizer, check_vocabulary_size

WEIGHTS = ("*.h5", "*.safetensors", "*.index.json", "model.weights.json")
VOCABULARIES = ("assets/tokenizer/*", "tokenizer.model", "tokenizer.json")

EXCLUDED = (
    *("*.bin", "*.ckpt", "*.dill", "*.joblib", "*.npy", "*.npz", "*.pickle", "*.pkl", "*.pt"),
    *("*.pth", "*.pyc"),
    *("*.bak", "*.incomplete", "*.lock", "*.part", "*.partial", "*.swp", "*.temp", "*.tmp", "*~"),
)
"""Files that are never sent: actual or possible pickles, and temporary files."""

_NAME = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?"


def upload_preset(uri: str, preset: str | Path, allow_incomplete: bool = False) -> None:
    """Uploads a preset's folder to Kaggle or Hugging Face, for `from_preset(uri)` to load.

    Hidden files, temporary files and pickles are not sent. A Hugging Face repository without a
    README.md gets a short one. The folder itself is not changed.

    Args:
        uri: `"kaggle://owner/model/framework/variation"`, such as
            `"kaggle://me/gemma/keras/my_gemma"`, or `"hf://owner/model"`. A new model is created
            private on Kaggle and public on Hugging Face; an existing one gets a new version.
        preset: A folder written by `save_to_preset`, or a Hugging Face checkpoint.
        allow_incomplete: If True, accepts a folder without weights or without a vocabulary.

    Raises:
        ValueError: If `uri` is malformed, `from_preset` could not load the folder, or the upload
            fails. The message gives advice.
        FileNotFoundError: If the folder does not exist or has no weights.
        TypeError: If `uri` is not a string, or `preset` is neither a string nor a path.

    Example:

    ```python
    import keras_gemma

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    lm.save_to_preset("my_gemma")
    # keras_gemma.upload_preset("hf://me/my_gemma", "my_gemma"), with your own account
    ```
    """
    if not isinstance(uri, str):
        raise TypeError(f"`uri` must be a string. Received: uri={uri!r}")
    if not isinstance(preset, str | Path):
        raise TypeError(f"`preset` must be a string or a path. Received: preset={preset!r}")
    scheme, _, handle = uri.partition("://")
    if scheme not in ("kaggle", "hf"):
        raise ValueError(
            "`uri` must begin with kaggle:// or hf://: 'kaggle://me/gemma/keras/my_gemma', "
            f"'hf://me/my_gemma'. Received: uri={uri!r}"
        )
    (_check_kaggle if scheme == "kaggle" else _check_hugging_face)(handle, uri)
    folder = Path(preset).expanduser()
    format, config = check_preset(folder, allow_incomplete)
    ignored = [glob.escape(name) for name in excluded_files(folder)]
    if scheme == "kaggle":
        _to_kaggle(handle, folder, ignored)
    else:
        _to_hugging_face(handle, folder, ignored, format.library, config)


def check_preset(folder: Path, allow_incomplete: bool = False) -> tuple[Format, GemmaConfig]:
    """Checks that `from_preset` can load `folder`. Returns its format and the model's config.

    Names and shapes of all tensors are compared with config.json; no tensor is read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            "`preset` must be an existing folder, as written by `save_to_preset`. "
            f"Received: preset={str(folder)!r}"
        )
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"`preset` has no {CONFIG}, so it cannot be loaded. Save a whole model "
            f"there with `lm.save_to_preset(...)`. Received: preset={str(folder)!r}"
        )
    for name in files_of(folder):
        within(folder, folder / name)
    format = format_of(folder)
    if format.library is None:
        raise ValueError(
            f"`preset` is an {format.title}, which `from_preset` does not download. Save the model "
            f"with `lm.save_to_preset(...)`. Received: preset={str(folder)!r}"
        )
    arguments = format.read_backbone(folder)
    config = GemmaConfig.from_dict(arguments)
    if _has(folder, WEIGHTS) or not allow_incomplete:
        with open_checked(format, folder, config, to_config(arguments.get("quantization"))):
            pass
    if _has(folder, VOCABULARIES) or not allow_incomplete:
        tokenizer = GemmaTokenizer(**format.read_tokenizer(folder))
        check_vocabulary_size(tokenizer, config.vocabulary_size)
    return format, config


def files_of(folder: Path) -> list[str]:
    """Returns the files in `folder` that are sent, relative to it, sorted."""
    return sorted(set(_all_files(folder)) - set(excluded_files(folder)))


def excluded_files(folder: Path) -> list[str]:
    """Returns the hidden and temporary files and pickles in `folder`, which are not sent."""
    return [
        name
        for name in _all_files(folder)
        if any(part.startswith((".", "__pycache__")) for part in Path(name).parts)
        or any(Path(name.lower()).match(pattern) for pattern in EXCLUDED)
    ]


def _all_files(folder: Path) -> list[str]:
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]


def model_card(repository: str, library: str, config: GemmaConfig) -> str:
    """Returns a README.md for a repository without one: a summary, how to load it, its sizes."""
    sizes = "\n".join(f"| `{name}` | {value} |" for name, value in config.to_dict().items())
    return f"""---
library_name: {library}
pipeline_tag: text-generation
---

A Gemma language model with {config.parameter_count:,} parameters.

```python
import keras_gemma  # or keras_hub

lm = keras_gemma.models.GemmaCausalLM.from_preset("hf://{repository}")
lm.generate("Once upon a time", max_length=64)
```

| | |
|---|---|
{sizes}

This card was generated by keras_gemma. Its author should add the training data, the intended use
and the license.
"""


def _has(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(any(folder.glob(pattern)) for pattern in patterns)


def _check_kaggle(handle: str, uri: str) -> None:
    from kagglehub.handle import parse_model_handle

    if not re.fullmatch("/".join([_NAME] * 4), handle):
        raise ValueError(
            "`uri` must have the form kaggle://owner/model/framework/variation, without a "
            f"version: Kaggle numbers versions itself. Received: uri={uri!r}"
        )
    try:
        parse_model_handle(handle).framework_enum()
    except ValueError as error:
        raise ValueError(
            "The third part of `uri` must be a framework that Kaggle knows: 'keras' for a Keras "
            f"preset, 'transformers' for a Hugging Face checkpoint. Received: uri={uri!r}"
        ) from error


def _check_hugging_face(handle: str, uri: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(handle)
    except HFValidationError as error:
        raise ValueError(
            "`uri` must have the form hf://owner/model, or hf://model for your own account, of "
            f"letters, digits, '-', '_' and '.'. Received: uri={uri!r}"
        ) from error


def _to_kaggle(handle: str, folder: Path, ignored: list[str]) -> None:
    import kagglehub
    from kagglehub import exceptions

    try:
        kagglehub.model_upload(handle, str(folder), ignore_patterns=ignored)
    except (
        OSError,
        exceptions.BackendError,
        exceptions.CredentialError,
        exceptions.UnauthenticatedError,
    ) as error:
        owner = handle.partition("/")[0]
        reason = advice(UPLOAD, error, hub="Kaggle", log_in=KAGGLE_TOKEN, owner=owner)
        raise ValueError(f"Could not upload to kaggle://{handle}: {reason}.") from error


def _to_hugging_face(
    handle: str, folder: Path, ignored: list[str], library: str, config: GemmaConfig
) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        repository = huggingface_hub.create_repo(handle, exist_ok=True).repo_id
        huggingface_hub.upload_folder(
            repo_id=repository, folder_path=folder, ignore_patterns=ignored
        )
        if not huggingface_hub.file_exists(repository, "README.md"):
            huggingface_hub.upload_file(
                path_or_fileobj=model_card(repository, library, config).encode(),
                path_in_repo="README.md",
                repo_id=repository,
            )
    except (
        OSError,
        errors.HTTPError,
        errors.LocalTokenNotFoundError,
        errors.OfflineModeIsEnabled,
    ) as error:
        owner = handle.partition("/")[0] if "/" in handle else "you"
        reason = advice(UPLOAD, error, hub="Hugging Face", log_in=HUGGING_FACE_TOKEN, owner=owner)
        raise ValueError(f"Could not upload to hf://{handle}: {reason}.") from error
