"""From a preset's name to its folder, which Kaggle's and Hugging Face's own clients fetch.

Knows nothing of what the folders hold. The clients keep what they fetched, so a second call
needs no network; they are imported when a download is asked for.
"""

import difflib
from pathlib import Path

from keras_gemma.storage.published import KAGGLE_HANDLES

FILES = ("*.json", "*.safetensors", "*.h5", "tokenizer.model", "assets/*")
"""What is fetched from a Hugging Face repository: never a pickle, never another format."""


def resolve(preset: str | Path) -> Path:
    """The folder that `preset` names, downloaded if need be.

    Raises:
        ValueError: no such preset (the nearest names are given), a handle of an unknown kind, or
            a download that failed.
        FileNotFoundError: a path to a folder that does not exist.
        TypeError: neither a string nor a path.
    """
    if not isinstance(preset, (str, Path)):
        raise TypeError(f"`preset` must be a string or a path. Received: preset={preset!r}")
    name = str(preset)
    if name.startswith("kaggle://"):
        return _from_kaggle(name.removeprefix("kaggle://"))
    if name.startswith("hf://"):
        return _from_hugging_face(name.removeprefix("hf://"))
    if "://" in name:
        raise ValueError(
            "`preset` handles begin with kaggle:// or hf://; for other sources, download the "
            f"folder and pass its path. Received: preset={name!r}"
        )
    built_in = _built_in().get(name)
    if built_in is not None:
        return built_in
    path = Path(preset).expanduser()
    if path.is_dir():
        return path
    if name in KAGGLE_HANDLES:
        return _from_kaggle(KAGGLE_HANDLES[name])
    if path.exists():
        raise ValueError(f"`preset` must be a folder, not a file. Received: preset={name!r}")
    if isinstance(preset, Path) or "/" in name or "\\" in name or name.startswith((".", "~")):
        raise FileNotFoundError(
            f"`preset` names a folder that does not exist. Received: preset={name!r}"
        )
    known = [*_built_in(), *KAGGLE_HANDLES]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known[:3]
    raise ValueError(
        f"No preset is called {name!r}. The nearest names are {', '.join(map(repr, near))}; "
        "a kaggle:// or hf:// handle or the path of a folder will do too. "
        f"Received: preset={name!r}"
    )


def builtin_names() -> list[str]:
    """The presets that come with the package, which need no download."""
    return sorted(_built_in())


def _built_in() -> dict[str, Path]:
    """Name to folder: package data, or the top of a source checkout."""
    package = Path(__file__).parents[1]
    roots = [package / "presets"]
    if (package.parent / "pyproject.toml").is_file():
        roots.append(package.parent / "presets")
    return {path.parent.name: path.parent for root in roots for path in root.glob("*/config.json")}


def _from_kaggle(handle: str) -> Path:
    """The folder of `owner/model/framework/variation[/version]` on Kaggle.

    Raises:
        ValueError: it could not be downloaded; the message says why.
    """
    import kagglehub
    from kagglehub import exceptions

    try:
        return Path(kagglehub.model_download(handle))
    except (
        OSError,
        ValueError,
        exceptions.BackendError,
        exceptions.CredentialError,
        exceptions.DataCorruptionError,
        exceptions.NotFoundError,
        exceptions.UnauthenticatedError,
    ) as error:
        raise _failed(f"kaggle://{handle}", "www.kaggle.com/models", error) from error


def _from_hugging_face(handle: str) -> Path:
    """The folder of `owner/model[@revision]` on Hugging Face.

    Raises:
        ValueError: it could not be downloaded; the message says why.
    """
    import huggingface_hub

    repository, _, revision = handle.partition("@")
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=list(FILES)
        )
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise _failed(f"hf://{handle}", "huggingface.co", error) from error
    return Path(folder)


def _failed(handle: str, site: str, error: Exception) -> ValueError:
    return ValueError(
        f"Could not download `preset={handle!r}`: {error}. Check the handle, the network, and "
        f"that your account is logged in and has accepted the model's licence on {site}; or "
        "download the folder by other means and pass its path."
    )
