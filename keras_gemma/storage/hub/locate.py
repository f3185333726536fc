"""Resolves a preset's name, handle or path to its folder, downloading it if needed.

Decides where a preset comes from; `downloads.py` fetches it, `installed.py` joins its parts. Knows
nothing about the content of the folders.
"""

import logging
import re
import warnings
from pathlib import Path

from keras_gemma.catalogue import Preset, presets, suggest
from keras_gemma.storage.gguf.header import is_gguf
from keras_gemma.storage.hub import downloads, installed
from keras_gemma.storage.hub.downloads import DownloadError, RequiredFiles

logger = logging.getLogger(__name__)

KAGGLE = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*){3}(/[1-9]\d*)?")
HUGGING_FACE = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>\w[\w./-]*))?")


def resolve(preset: str | Path, *, text: bool = True, weights: bool = True) -> Path:
    """Returns the folder or GGUF file of a built-in name, a handle or a path.

    `text` and `weights` say if a load needs the files of the tokenizer and preprocessor, and the
    weights. Missing ones are downloaded.
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
        try:
            return _fetch(_hub_handle(name), required)
        except DownloadError as error:
            raise DownloadError(f"Could not download `preset={name!r}`: {error}.") from error
    if isinstance(preset, str) and name in presets():
        if Path(name).is_dir():
            warnings.warn(
                f"{name!r} is a built-in name, so that preset is loaded, although a folder of "
                f"this name exists. To load the folder, pass './{name}'.",
                stacklevel=4,  # the caller of `from_preset`
            )
        return _from_builtin_name(presets()[name], required)
    path = Path(preset).expanduser()
    if path.is_dir() or is_gguf(path):
        return path
    if path.exists():
        raise ValueError(
            f"`preset` must be a folder or a GGUF file. Received: preset={name!r}, another file"
        )
    is_path = "/" in name or "\\" in name or name.startswith((".", "~")) or path.suffix == ".gguf"
    if isinstance(preset, Path) or is_path:
        hint = ""
        if HUGGING_FACE.fullmatch(name) and path.suffix != ".gguf":
            hint = f" For the model on Hugging Face, pass 'hf://{name}'."
        raise FileNotFoundError(
            f"`preset` names a folder or file that does not exist.{hint} Received: preset={name!r}"
        )
    raise ValueError(
        f"Unknown preset {name!r}. {suggest(name)} "
        "A kaggle:// or hf:// handle, or the path of a folder or GGUF file, is accepted too. "
        f"Received: preset={name!r}"
    )


def _fetch(handle: str, required: RequiredFiles) -> Path:
    scheme, _, rest = handle.partition("://")
    if scheme == "kaggle":
        if not KAGGLE.fullmatch(rest) or ".." in rest:
            raise ValueError(
                "`preset` must have the form kaggle://owner/model/framework/variation, "
                "optionally with /version: 'kaggle://keras/gemma2/keras/gemma2_2b_en/2'. "
                f"Received: preset={handle!r}"
            )
        return downloads.from_kaggle(rest, required)
    if scheme == "hf":
        match = HUGGING_FACE.fullmatch(rest)
        if not match or ".." in rest:
            raise ValueError(
                "`preset` must have the form hf://owner/model, optionally with @revision, or "
                "hf:// and a built-in name: 'hf://google/gemma-2-2b', 'hf://gemma2_2b_en'. "
                f"Received: preset={handle!r}"
            )
        revision = match["revision"] or "main"
        return downloads.from_hugging_face(match["repository"], revision, required)
    raise ValueError(
        "`preset` handles must begin with kaggle:// or hf://. For other sources, download the "
        f"folder and pass its path. Received: preset={handle!r}"
    )


def _hub_handle(handle: str) -> str:
    """Returns `handle`, with the owner and model for a built-in name after `hf://`."""
    name, at, revision = handle.removeprefix("hf://").partition("@")
    if not handle.startswith("hf://") or name not in presets():
        return handle
    hub_handle = presets()[name].hugging_face_handle
    if hub_handle is None:
        raise ValueError(
            f"{name!r} is not on Hugging Face: it comes with the package or an extra. Pass only "
            f"its name. Received: preset={handle!r}"
        )
    return hub_handle + at + revision


def _from_builtin_name(preset: Preset, required: RequiredFiles) -> Path:
    """Returns the folder or file of a built-in name: installed, cached or downloaded."""
    if preset.has_weights or not (required.text or required.weights):
        return preset.folder
    if preset.package is not None:
        return installed.find(preset.name, preset.package)
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
    raise DownloadError(
        f"Could not download `preset={preset.name!r}` from either hub. One of them is enough. "
        + "".join(reasons).strip()
    )
