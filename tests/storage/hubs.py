"""Caches in the layouts of `huggingface_hub` and `kagglehub`."""

import hashlib
import json
import os
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def file_names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def lay_out_hugging_face(
    cache: Path,
    repository: str,
    source: Path,
    *,
    names: list[str] | None = None,
    reference: str = "main",
    commit: str = COMMIT,
    tree: bool = True,
) -> Path:
    """Creates a snapshot of `source`, or of its files `names`. Returns its folder.

    `tree`: with the list of all files of the repository, by which later releases of the client
    know that something is missing.
    """
    repository_folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = repository_folder / "snapshots" / commit
    (repository_folder / "blobs").mkdir(parents=True, exist_ok=True)
    listed = {}
    for name in file_names(source):
        content = (source / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        listed[name] = {"size": len(content), "blob_id": digest[:40]}
        if names is None or name in names:
            (repository_folder / "blobs" / digest).write_bytes(content)
            link = snapshot / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(repository_folder / "blobs" / digest, link.parent))
    (repository_folder / "refs").mkdir(exist_ok=True)
    (repository_folder / "refs" / reference).write_text(commit)
    if tree:
        (repository_folder / "trees").mkdir(exist_ok=True)
        content = json.dumps({"format_version": 1, "files": listed})
        (repository_folder / "trees" / f"{commit}.json").write_text(content)
    return snapshot


def lay_out_kaggle(
    cache: Path, handle: str, source: Path, *, names: list[str] | None = None, whole: bool = False
) -> Path:
    """Creates a cached version, fetched by file or as a `whole`. Returns its folder."""
    variation, version = (cache / "models" / handle).parent, handle.rpartition("/")[2]
    folder = variation / version
    for name in file_names(source):
        if names is not None and name not in names:
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((source / name).read_bytes())
        if not whole:
            marker = variation / ".complete" / version / f"{name}.complete"
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
    if whole:
        (variation / f"{version}.complete").touch()
    return folder
