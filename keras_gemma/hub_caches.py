"""Where `kagglehub` and `huggingface_hub` keep what they fetched.

Knows the paths that both document, and the variables that move them. Needs no network, and
imports neither: a question about the cache is answered at once. Downloads nothing.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

WEIGHTS = ("model.weights.h5", "model.safetensors")
WEIGHTS_INDICES = ("model.weights.json", "model.safetensors.index.json")

Find = Callable[[str], Path | None]
"""From a file's name in a preset to its place on this machine; None where it is not whole."""


def kaggle_finder(handle: str) -> Find:
    """What the cache holds of `owner/model/framework/variation/version`; the version is needed.

    A file counts once its marker says that the download is complete:

        models/owner/model/framework/variation/
            3/config.json                       a file of version 3
            .complete/3/config.json.complete    that file is whole
            3.complete                          all files of version 3 are
    """
    default = Path.home() / ".cache" / "kagglehub"
    variation, _, version = handle.rpartition("/")
    folder = Path(os.environ.get("KAGGLEHUB_CACHE", default)) / "models" / variation

    def find(name: str) -> Path | None:
        markers = (
            folder / f"{version}.complete",
            folder / ".complete" / version / f"{name}.complete",
        )
        path = folder / version / name
        return path if path.is_file() and any(map(Path.is_file, markers)) else None

    return find


def hugging_face_finder(repository: str, revision: str = "main") -> Find:
    """What the cache holds of `owner/model` at `revision`: a branch, a tag or a commit.

    Files appear when they are whole:

        models--owner--model/
            refs/main               the commit that `main` was
            snapshots/<commit>/     links to blobs/
    """
    folder = hugging_face_cache() / f"models--{repository.replace('/', '--')}"
    reference = folder / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision

    def find(name: str) -> Path | None:
        path = folder / "snapshots" / commit / name
        return path if path.is_file() else None

    return find


def hugging_face_cache() -> Path:
    """The folder of `huggingface_hub`'s cache, as its environment variables say."""
    environment = os.environ
    home = environment.get("XDG_CACHE_HOME", Path.home() / ".cache")
    home = environment.get("HF_HOME", Path(home) / "huggingface")
    cache = environment.get("HUGGINGFACE_HUB_CACHE", Path(home) / "hub")
    cache = environment.get("HF_HUB_CACHE", cache)
    return Path(os.path.expandvars(cache)).expanduser()


def holds_weights(find: Find) -> bool:
    """Whether weights are there, whole: one file, or an index and all that it names."""
    if any(find(name) for name in WEIGHTS):
        return True
    indices = [path for name in WEIGHTS_INDICES if (path := find(name))]
    return any(names and all(map(find, names)) for names in map(shard_names, indices))


def shard_names(index: Path) -> list[str]:
    """The files that an index of weights names, sorted; errors as of `read_index`."""
    return sorted({name for names in read_index(index).values() for name in names})


def read_index(index: Path) -> dict[str, list[str]]:
    """What an index of weights says: for each tensor, or group of tensors, its files.

    Raises:
        ValueError: the file is no index of weights, or a name leads out of its folder.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _no_index(index, f"it is not valid JSON: {error}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise _no_index(index, "it lacks its `weight_map`")
    found = {}
    for entry, names in weight_map.items():
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise _no_index(index, f"it gives {entry!r} the file {names!r}")
        for name in names:
            if name in ("", "..") or name != Path(name).name or "\\" in name or "\0" in name:
                raise ValueError(
                    f"{index} names the file {name!r}, which does not lie directly in its "
                    "folder. An index may name plain file names only: do not trust this checkpoint."
                )
        found[entry] = names
    return found


def _no_index(index: Path, reason: str) -> ValueError:
    return ValueError(
        f"{index} is no index of weights: {reason}. Delete it, and fetch or save the preset again."
    )
