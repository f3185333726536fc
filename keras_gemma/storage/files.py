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

NEW, OLD = "new", "old"
"""While a folder is replaced, what takes its place, and what it was."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        ValueError: the file is not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
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


def check_types(values: dict[str, Any], expected: dict[str, tuple[type, ...]], path: Path) -> None:
    """Raise where a JSON file gives a key a value of another type, as `"yes"` for `true`.

    Args:
        values: what the file says.
        expected: for a key, the types that it may have; keys that are absent do not matter.
        path: the file, for the message.

    Raises:
        ValueError: values are of other types; all of them are listed.
    """
    names = {type(None): "None"}
    wrong = [
        f"{key}={values[key]!r}, not {' or '.join(names.get(k, k.__name__) for k in kinds)}"
        for key, kinds in expected.items()
        if key in values and type(values[key]) not in kinds  # True is an int to `isinstance`
    ]
    if wrong:
        raise ValueError(
            f"{path} has values of another type: {'; '.join(wrong)}. Fetch or save it again."
        )


def shards(folder: Path, names: set[str], index: str) -> list[Path]:
    """The files that an index names, as paths in `folder`, sorted.

    Args:
        folder: where they lie.
        names: plain file names, as `hub_caches.read_index` gives them.
        index: the name of the index, for the messages.

    Raises:
        ValueError: a file is a link out of the folder.
        FileNotFoundError: files are missing; all of them are listed.
    """
    paths = [within(folder, folder / name) for name in sorted(names)]
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


def local_path(path: str | Path, argument: str) -> Path:
    """Where on this machine to write, from what a caller was given as `argument`.

    Raises:
        TypeError: neither a string nor a path.
        ValueError: empty, or an address such as `hf://owner/model`.
    """
    if not isinstance(path, str | Path):
        raise TypeError(f"`{argument}` must be a string or a path. Received: {argument}={path!r}")
    if not str(path):
        raise ValueError(f"`{argument}` must not be empty: name a place. Received: ''")
    if "://" in str(path) or str(path).startswith(("hf:/", "kaggle:/")):
        raise ValueError(
            f"`{argument}` must be a path on this machine. Save there, and send the folder by "
            f"`keras_gemma.upload_preset(uri, folder)`. Received: {argument}={str(path)!r}"
        )
    return Path(path).expanduser()


@contextlib.contextmanager
def scratch_folder(target: Path, argument: str) -> Iterator[Path]:
    """A hidden folder to work in, beside `target`, removed with what is left in it at the end.

    Args:
        target: an absolute path; its parents are made.
        argument: what the caller calls it, for the message.

    Raises:
        ValueError: nothing can be written there.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ValueError(
            f"`{argument}` cannot be written: {error.strerror}. Name a place where you may write. "
            f"Received: {argument}={str(target)!r}"
        ) from error
    try:
        yield work
    finally:
        if target.exists() or not (work / OLD).exists():
            shutil.rmtree(work)


@contextlib.contextmanager
def replacing(
    folder: Path, stale: Callable[[str], bool], argument: str = "preset_dir"
) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` when the block ends well.

    It lies beside `folder`. Files of the earlier folder stay, except those written anew and
    those that are `stale`; what is replaced passes its permissions on. If the block raises, the
    earlier folder is as it was. If the process dies between the two renames at the end, nothing
    has its name, and it lies whole beside its old place, in a hidden folder:

        my_gemma             renamed to .my_gemma.k3x9/old, for a moment
        .my_gemma.k3x9/new   then renamed to my_gemma

    Args:
        folder: what to replace or create; its parents are made.
        stale: from a path relative to the folder (`"assets/x"`), whether to drop that file.
        argument: what the caller calls `folder`, for messages.

    Raises:
        ValueError: `folder` is a file, or the process stands in it and so it cannot be moved, or
            nothing can be written there.
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
    with scratch_folder(folder, argument) as work:
        fresh, earlier = work / NEW, work / OLD
        fresh.mkdir()
        yield fresh
        if folder.exists():
            _carry_over(folder, fresh, stale)
            folder.rename(earlier)
        try:
            fresh.rename(folder)
        except OSError:
            if earlier.exists():
                earlier.rename(folder)
            raise


def _carry_over(folder: Path, fresh: Path, stale: Callable[[str], bool]) -> None:
    """Link, or copy where the file system has no links, what `fresh` does not replace."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        kept = fresh / name
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                kept.mkdir(parents=True, exist_ok=True)
        elif not kept.exists() and not stale(name.as_posix()):
            kept.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, kept, follow_symlinks=False)
            except OSError:
                shutil.copy2(path, kept, follow_symlinks=False)
    for path in (folder, *folder.rglob("*")):
        kept = fresh / path.relative_to(folder)
        if kept.exists() and not path.is_symlink() and not kept.is_symlink():
            shutil.copymode(path, kept)
