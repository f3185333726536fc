"""Downloads of presets through Kaggle's and Hugging Face's own clients.

Knows which files a load needs. `errors.py` turns the clients' errors into advice. The clients show
progress, resume, cache files and have offline modes; they are imported only for a download.
Knows neither preset names (`locate.py`) nor the content of the files.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from keras_gemma import hub_caches
from keras_gemma.storage.files import read_json
from keras_gemma.storage.hub import errors as hub_errors
from keras_gemma.storage.hub.errors import BY_HAND, advice, status_of

CONFIG = "config.json"
VOCABULARIES = ("assets/tokenizer/vocabulary.spm", "tokenizer.model")
SETTINGS = ("tokenizer.json", "preprocessor.json", "task.json")

TEXT_PATTERNS = (*VOCABULARIES, "*.json")
WEIGHTS_PATTERNS = ("*.safetensors", "*.h5", "*.json")
NESTED_PATTERNS = ("*/*.safetensors", "*/*.h5", "*/*.json")
"""Subfolders that are not fetched from Hugging Face: they hold second copies of the weights."""


class DownloadError(ValueError):
    """A failed download. The message gives the reason and advice."""


@dataclasses.dataclass(frozen=True)
class RequiredFiles:
    """Files of a preset that a load needs, in addition to config.json."""

    text: bool = True
    """True if the vocabulary and the tokenizer's and preprocessor's settings are needed."""
    weights: bool = True

    def are_cached(self, find: hub_caches.Find) -> bool:
        """Returns True if all files are in a cache.

        Settings may be absent: they are fetched first, so a complete cache has them if they exist.
        """
        return (
            find(CONFIG) is not None
            and (not self.text or any(find(name) for name in VOCABULARIES))
            and (not self.weights or hub_caches.holds_weights(find))
        )

    def patterns(self) -> list[str]:
        """Returns the file name patterns for Hugging Face's client."""
        text = TEXT_PATTERNS if self.text else ()
        return [CONFIG, *text, *(WEIGHTS_PATTERNS if self.weights else ())]


def from_kaggle(handle: str, required: RequiredFiles) -> Path:
    """Returns the folder of `owner/model/framework/variation[/version]`, fetched file by file.

    A version never changes, so a cached one needs no network.
    """
    cached = hub_caches.kaggle_finder(handle)
    if _has_version(handle) and required.are_cached(cached):
        return cached(CONFIG).parent

    import kagglehub
    from kagglehub import exceptions
    from requests.exceptions import RequestException

    try:
        config = _kaggle_file(handle, CONFIG)
        if config is None:
            raise DownloadError(
                f"Kaggle has no {CONFIG} there. Look for the model and its versions at "
                f"{_kaggle_page(handle)}, {BY_HAND}"
            )
        folder = config.parent
        if not _has_version(handle) and folder.name.isdigit():
            handle = f"{handle}/{folder.name}"  # one version for all files
        _kaggle_files(lambda name: _kaggle_file(handle, name), read_json(config), required)
    except (
        RequestException,
        exceptions.BackendError,
        exceptions.ColabEnvironmentError,
        exceptions.CredentialError,
        exceptions.DataCorruptionError,
        exceptions.KaggleEnvironmentError,
        exceptions.NotFoundError,
        exceptions.UnauthenticatedError,
    ) as error:
        is_refused = status_of(error) in (401, 403)
        no_credentials = is_refused and kagglehub.config.get_kaggle_credentials() is None
        hint = "; a handle that ends in a version needs no network once cached"
        reason = advice(
            hub_errors.KAGGLE_DOWNLOAD,
            error,
            {hub_errors.NO_CREDENTIALS} if no_credentials else None,
            page=_kaggle_page(handle),
            hint="" if _has_version(handle) else hint,
        )
        raise DownloadError(reason) from error
    return folder


def from_hugging_face(repository: str, revision: str, required: RequiredFiles) -> Path:
    """Returns the folder of `owner/model` at a branch, tag or commit."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            allow_patterns=required.patterns(),
            ignore_patterns=list(NESTED_PATTERNS),
        )
    except (
        errors.HTTPError,
        errors.LocalEntryNotFoundError,
        errors.LocalTokenNotFoundError,
        errors.OfflineModeIsEnabled,
    ) as error:
        cached = hub_caches.hugging_face_finder(repository, revision)
        if isinstance(error, errors.LocalEntryNotFoundError) and required.are_cached(cached):
            return cached(CONFIG).parent  # only files that no load needs are missing
        # "Not in the cache" may hide the actual error, which is the cause.
        cause = error.__cause__ if isinstance(error.__cause__, errors.HfHubHTTPError) else error
        reason = advice(
            hub_errors.HUGGING_FACE_DOWNLOAD,
            cause,
            {hub_errors.OFFLINE} if huggingface_hub.constants.HF_HUB_OFFLINE else None,
            page=f"https://huggingface.co/{repository}",
            revision=revision,
        )
        raise DownloadError(reason) from error
    return Path(folder)


def _kaggle_file(handle: str, name: str) -> Path | None:
    """Fetches one file. Returns `None` if the model has no such file."""
    import kagglehub
    from kagglehub.exceptions import KaggleApiHTTPError

    try:
        return Path(kagglehub.model_download(handle, path=name))
    except KaggleApiHTTPError as error:
        if status_of(error) == 404:
            return None
        raise
    except ValueError as error:
        if "is not present in the model files" in str(error):  # raised in Kaggle's notebooks
            return None
        raise


def _kaggle_files(
    fetch: Callable[[str], Path | None], config: dict, required: RequiredFiles
) -> None:
    """Fetches the required files, settings first: a complete cache has them if they exist."""
    keras = "model_type" not in config
    if required.text:
        for name in SETTINGS if keras else ("tokenizer.json",):
            fetch(name)
        fetch(VOCABULARIES[0] if keras else VOCABULARIES[1])  # or tokenizer.json
    if required.weights:
        if keras:
            fetch("metadata.json")  # for the context length
        index = fetch("model.weights.json" if keras else "model.safetensors.index.json")
        single = "model.weights.h5" if keras else "model.safetensors"
        for name in [single] if index is None else hub_caches.shard_names(index):
            fetch(name)


def _has_version(handle: str) -> bool:
    return handle.count("/") == 4


def _kaggle_page(handle: str) -> str:
    return "https://www.kaggle.com/models/" + "/".join(handle.split("/")[:2])
