"""From a preset's name, handle or path to its folder, downloaded if need be.

Decides where a preset comes from; `downloads.py` fetches it. Knows nothing of what the folders
hold.
"""

import difflib
import logging
import re
import warnings
from pathlib import Path

from keras_gemma.catalogue import Preset, presets
from keras_gemma.storage.hub import downloads
from keras_gemma.storage.hub.downloads import RequiredFiles, DownloadError

logger = logging.getLogger(__name__)

KAGGLE = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*){3}(/[1-9]\d*)?")
HUGGING_FACE = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>\w[\w./-]*))?")


def resolve(preset: str | Path, *, text: bool = True, weights: bool = True) -> Path:
    """The folder that `preset` names, with what a load needs in it.

    Args:
        preset: a built-in name, a `kaggle://` or `hf://` handle, or a directory.
        text: whether vocabulary, tokenizer and preprocessor are needed.
        weights: whether the weights are needed.

    Raises:
        ValueError: no such preset (the nearest names are given), a malformed handle, or a
            download that failed, or an empty name.
        FileNotFoundError: a path to a folder that does not exist.
        TypeError: neither a string nor a path.
    """
    if not isinstance(preset, (str, Path)):
        raise TypeError(f"`preset` must be a string or a path. Received: preset={preset!r}")
    required = RequiredFiles(text, weights)
    name = str(preset)
    if not preset or name.isspace():
        raise ValueError(
            "`preset` must not be empty: pass a built-in name, a handle or the path of a folder, "
            f"'.' for the current one. Received: preset={preset!r}"
        )
    if "://" in name and isinstance(preset, str):
        return _from_handle(name, required)
    if isinstance(preset, str) and name in presets():
        if Path(name).is_dir():
            warnings.warn(
                f"{name!r} is a built-in name, and that preset is loaded, though there is a folder "
                f"of this name here. For the folder, pass './{name}'.",
                stacklevel=4,  # where `from_preset` is called
            )
        return _from_builtin_name(presets()[name], required)
    path = Path(preset).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"`preset` must be a folder, not a file. Received: preset={name!r}")
    if isinstance(preset, Path) or "/" in name or "\\" in name or name.startswith((".", "~")):
        raise FileNotFoundError(
            f"`preset` names a folder that does not exist. Received: preset={name!r}"
        )
    raise ValueError(
        f"No preset is called {name!r}. The nearest names are {_nearest(name)}; "
        "a kaggle:// or hf:// handle or the path of a folder will do too. "
        f"Received: preset={name!r}"
    )


def _from_handle(handle: str, required: RequiredFiles) -> Path:
    """The folder behind a `kaggle://` or `hf://` handle, alone or after a built-in name."""
    twin = _hugging_face_handle(handle) or handle
    try:
        return _fetch(twin, required)
    except DownloadError as error:
        raise ValueError(f"Could not download `preset={handle!r}`: {error}.") from error


def _fetch(handle: str, required: RequiredFiles) -> Path:
    scheme, _, rest = handle.partition("://")
    if scheme == "kaggle":
        if not KAGGLE.fullmatch(rest) or ".." in rest:
            raise ValueError(
                "`preset` must read kaggle://owner/model/framework/variation, or that and "
                "/version: 'kaggle://keras/gemma2/keras/gemma2_2b_en/2'. "
                f"Received: preset={handle!r}"
            )
        return downloads.from_kaggle(rest, required)
    if scheme == "hf":
        match = HUGGING_FACE.fullmatch(rest)
        if not match or ".." in rest:
            raise ValueError(
                "`preset` must read hf://owner/model, or that and @revision, or hf:// and a "
                "built-in name: 'hf://google/gemma-2-2b', 'hf://gemma2_2b_en'. "
                f"Received: preset={handle!r}"
            )
        return downloads.from_hugging_face(match["repository"], match["revision"] or "", required)
    raise ValueError(
        "`preset` handles begin with kaggle:// or hf://; for other sources, download the "
        f"folder and pass its path. Received: preset={handle!r}"
    )


def _hugging_face_handle(handle: str) -> str | None:
    """For `hf://` and a built-in name, the handle of its twin there."""
    name, at, revision = handle.removeprefix("hf://").partition("@")
    if not handle.startswith("hf://") or name not in presets():
        return None
    twin = presets()[name].hugging_face_handle
    if twin is None:
        raise ValueError(
            f"{name!r} is not on Hugging Face: it comes with the package. Pass its name alone. "
            f"Received: preset={handle!r}"
        )
    return twin + at + revision


def _from_builtin_name(preset: Preset, required: RequiredFiles) -> Path:
    """The folder of a built-in name: the package's, a cached one, or a downloaded one."""
    if preset.has_weights or not (required.text or required.weights):
        return preset.folder
    for find in preset.finders().values():
        if required.are_cached(find):
            return find(downloads.CONFIG).parent
    reasons = []
    for handle in preset.finders():
        try:
            return _fetch(handle, required)
        except DownloadError as error:
            logger.info("%s could not be downloaded: %s.", handle, error)
            reasons.append(f"{handle}: {error}. ")
    raise ValueError(
        f"Could not download `preset={preset.name!r}` from either hub; one will do. "
        + "".join(reasons).strip()
    )


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, presets(), n=3, cutoff=0.5) or list(presets())[:3]
    return ", ".join(map(repr, near))
