"""JSON files, file names that come from an index, and replacing a folder as a whole.

Knows nothing of models, tensors or presets.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        ValueError: the file is not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not valid JSON: {error}. Fetch or save the preset again."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} must hold a JSON object. Received: {type(content).__name__}. "
            "Fetch or save the preset again."
        )
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to `path`, indented as Keras writes its own."""
    path.write_text(json.dumps(content, indent=4), encoding="utf-8")


def shards(folder: Path, names: set[str], index: str) -> list[Path]:
    """The files that an index names, as paths in `folder`, sorted.

    Raises:
        ValueError: a name leads out of the folder.
        FileNotFoundError: files are missing; all of them are listed.
    """
    for name in sorted(names):
        if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise ValueError(
                f"{folder / index} names the file {name!r}, which does not lie directly in its "
                "folder. An index may name plain file names only: do not trust this checkpoint."
            )
    paths = [folder / name for name in sorted(names)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder / index} names {len(paths)} files, of which {len(missing)} are missing: "
            f"{', '.join(missing)}. Fetch the checkpoint again."
        )
    return paths


def within(folder: Path, path: Path) -> Path:
    """`path`, where no link leads it out of `folder`.

    The folders of Hugging Face's cache are links into the `blobs` beside them, and may be:

        models--owner--model/snapshots/<commit>/config.json -> ../../blobs/<hash>

    Raises:
        ValueError: it leads out.
    """
    root = folder.resolve()
    repository = root.parent.parent
    if root.parent.name == "snapshots" and repository.name.startswith("models--"):
        root = repository
    target = path.resolve()
    if not target.is_relative_to(root):
        raise ValueError(
            f"{path} is a link to {target}, which lies outside its folder: do not trust this "
            "preset, or put the file itself there."
        )
    return path


@contextlib.contextmanager
def replacing(
    folder: Path, stale: Callable[[str], bool], argument: str = "preset_dir"
) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` when the block ends well.

    It lies beside `folder`. Files of the earlier folder stay, except those written anew and
    those that are `stale`. If the block raises, the earlier folder is as it was; if the process
    dies between the two renames at the end, it lies whole beside its old place.

    Args:
        folder: what to replace or create; its parents are made.
        stale: from a path relative to the folder (`"assets/x"`), whether to drop that file.
        argument: what the caller calls `folder`, for messages.

    Raises:
        ValueError: `folder` is a file, or the process stands in it and so it cannot be moved.
    """
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`{argument}` must be a folder, and {folder} is a file. Name another.")
    if folder.exists() and Path.cwd().is_relative_to(folder):
        raise ValueError(
            f"`{argument}` is the current directory or holds it, so it cannot be replaced as a "
            f"whole. Received: {folder}. Save to a folder of its own, such as "
            f"{str(folder / 'my_gemma')!r}."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    fresh, earlier = work / "new", work / "old"
    fresh.mkdir()
    try:
        yield fresh
        if folder.exists():
            _keep_the_rest(folder, fresh, stale)
            folder.rename(earlier)
        try:
            fresh.rename(folder)
        except OSError:
            if earlier.exists():
                earlier.rename(folder)
            raise
    finally:
        if folder.exists() or not earlier.exists():
            shutil.rmtree(work)


def _keep_the_rest(folder: Path, fresh: Path, stale: Callable[[str], bool]) -> None:
    """Link, or copy where the file system has no links, what `fresh` does not replace."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        kept = fresh / name
        if path.is_dir() and not path.is_symlink():
            kept.mkdir(parents=True, exist_ok=True)
        elif not kept.exists() and not stale(name.as_posix()):
            kept.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, kept, follow_symlinks=False)
            except OSError:
                shutil.copy2(path, kept, follow_symlinks=False)
