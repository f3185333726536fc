"""Local caches of `kagglehub`, `huggingface_hub` and this package.

Knows their documented paths and the environment variables that change them. Imports neither
client and downloads nothing.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

WEIGHTS = ("model.weights.h5", "model.safetensors")
WEIGHTS_INDICES = ("model.weights.json", "model.safetensors.index.json")

Find = Callable[[str], Path | None]
"""Function from a preset file name to its local path, or `None` if it is not fully downloaded."""


def kaggle_finder(handle: str) -> Find:
    """Returns a finder for `owner/model/framework/variation/version`; the version is required.

    A model that is attached to a Kaggle notebook is complete. In the cache, only files with a
    marker of a complete download are found:

        models/owner/model/framework/variation/
            3/config.json                       a file of version 3
            .complete/3/config.json.complete    that file is complete
            3.complete                          all files of version 3 are complete
    """
    for attached in attached_folders(handle):
        if attached.is_dir():
            return folder_finder(attached)
    variation, _, version = handle.rpartition("/")
    folder = kaggle_cache() / "models" / variation

    def find(name: str) -> Path | None:
        markers = (
            folder / f"{version}.complete",
            folder / ".complete" / version / f"{name}.complete",
        )
        path = folder / version / name
        return path if path.is_file() and any(map(Path.is_file, markers)) else None

    return find


def hugging_face_finder(repository: str, revision: str = "main") -> Find:
    """Returns a finder for `owner/model` at `revision`: a branch, a tag or a commit.

    Only complete files are in the cache:

        models--owner--model/
            refs/main               the commit that `main` was
            snapshots/<commit>/     links to blobs/
    """
    folder = hugging_face_cache() / f"models--{repository.replace('/', '--')}"
    reference = folder / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    return folder_finder(folder / "snapshots" / commit)


def folder_finder(folder: Path) -> Find:
    """Returns a finder for a folder whose files are all complete."""

    def find(name: str) -> Path | None:
        path = folder / name
        return path if path.is_file() else None

    return find


def kaggle_cache() -> Path:
    """Returns the cache folder of `kagglehub`, using its environment variable."""
    return Path(os.environ.get("KAGGLEHUB_CACHE", Path.home() / ".cache" / "kagglehub"))


def attached_folders(handle: str) -> tuple[Path, Path]:
    """Returns the folders of a model attached to a Kaggle notebook: the current one, and an older
    one without the owner. Uses the environment variable of `kagglehub`."""
    root = Path(os.environ.get("KAGGLE_CACHE_MOUNT_FOLDER", "/kaggle/input"))
    return root / "models" / handle, root / handle.partition("/")[2]


def hugging_face_cache() -> Path:
    """Returns the cache folder of `huggingface_hub`, using its environment variables."""
    environment = os.environ
    home = environment.get("XDG_CACHE_HOME", Path.home() / ".cache")
    home = environment.get("HF_HOME", Path(home) / "huggingface")
    cache = environment.get("HUGGINGFACE_HUB_CACHE", Path(home) / "hub")
    cache = environment.get("HF_HUB_CACHE", cache)
    return Path(os.path.expandvars(cache)).expanduser()


def own_cache() -> Path:
    """Returns the folder of this package in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "keras_gemma"


def holds_weights(find: Find) -> bool:
    """Returns True if all weights are found: one file, or an index and all its shards."""
    if any(find(name) for name in WEIGHTS):
        return True
    indices = [path for name in WEIGHTS_INDICES if (path := find(name))]
    return any(names and all(map(find, names)) for names in map(shard_names, indices))


def shard_names(index: Path) -> list[str]:
    """Returns the sorted shard names of a weights index."""
    return sorted({name for names in read_index(index).values() for name in names})


def read_index(index: Path) -> dict[str, list[str]]:
    """Reads a weights index: the files of each tensor or group of tensors."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _invalid_index(index, f"it is not valid JSON: {error}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise _invalid_index(index, "`weight_map` is missing or empty")
    files = {}
    for entry, names in weight_map.items():
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise _invalid_index(index, f"it gives {entry!r} the file {names!r}")
        for name in names:
            if name in ("", "..") or name != Path(name).name or "\\" in name or "\0" in name:
                raise ValueError(
                    f"{index} names the file {name!r}, which is not directly in its "
                    "folder. An index may only name plain files: do not trust this checkpoint."
                )
        files[entry] = names
    return files


def _invalid_index(index: Path, reason: str) -> ValueError:
    return ValueError(
        f"{index} is not a valid weights index: {reason}. Delete it, and download or save the "
        "preset again."
    )
