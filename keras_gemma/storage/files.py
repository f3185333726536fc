"""JSON files, file names from untrusted indices, and atomic replacement of files and folders.

Knows nothing of models, tensors or presets.
"""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from keras_gemma.hub_caches import read_index

NEW, OLD = "new", "old"
"""Names of the new and the earlier folder during a replacement."""

FULL_DISK = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
"""Texts of the system for a full disk or quota. Errors of HDF5 and other libraries contain them."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """Kind of file or folder that a save writes and may replace."""

    title: str
    """Plural for messages, such as `"exports"`."""
    matches: Callable[[Path], bool]
    """Returns True if an existing path is of this kind."""
    is_folder: bool = True


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in `path`."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
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
    """Writes `content` to `path`, indented as in Keras."""
    path.write_text(json.dumps(content, indent=4), encoding="utf-8")


def check_types(values: dict[str, Any], expected: dict[str, tuple[type, ...]], path: Path) -> None:
    """Checks the types of a JSON file's values, for example rejects `"yes"` for `true`.

    `expected` has the accepted types of each key. Keys may be absent.
    """
    names = {type(None): "None"}
    wrong = [
        f"{key}={values[key]!r}, not {' or '.join(names.get(k, k.__name__) for k in kinds)}"
        for key, kinds in expected.items()
        if key in values and type(values[key]) not in kinds  # True is an int to `isinstance`
    ]
    if wrong:
        raise ValueError(
            f"{path} has values of a wrong type: {'; '.join(wrong)}. Fetch or save it again."
        )


def find_weights(folder: Path, single: str, index: str) -> tuple[list[Path], dict[str, list[str]]]:
    """Returns the weights files in `folder`, and the file names of each entry of their index.

    The index is empty if all weights are in the file `single`.
    """
    if (folder / single).is_file():
        return [folder / single], {}
    if not (folder / index).is_file():
        advice = "Pass `load_weights=False` for a model with random weights."
        if any(path.suffix in (".bin", ".pt") for path in folder.iterdir()):
            advice = (
                "Its .bin or .pt files are pickles, which can run code and are never read: save "
                "the model as safetensors."
            )
        raise FileNotFoundError(
            f"{folder} holds no weights: looked for {single} and {index}. {advice}"
        )
    files_of = read_index(folder / index)
    names = {name for files in files_of.values() for name in files}
    paths = [within(folder, folder / name) for name in sorted(names)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder / index} names {len(paths)} files, of which {len(missing)} are missing: "
            f"{', '.join(missing)}. Fetch the checkpoint again."
        )
    return paths, files_of


def within(folder: Path, path: Path) -> Path:
    """Returns `path` unchanged if no link leads it out of `folder`.

    In Hugging Face's cache, the files are links to `blobs`, which is accepted:

        models--owner--model/snapshots/<commit>/config.json -> ../../blobs/<hash>
    """
    root = folder.resolve()
    repository = root.parent.parent
    if root.parent.name == "snapshots" and repository.name.startswith("models--"):
        root = repository
    target = path.resolve()
    if not target.is_relative_to(root):
        raise ValueError(
            f"{path} is a link to {target}, which is outside its folder: do not trust this "
            "preset, or replace the link with the file."
        )
    return path


def local_path(path: str | Path, argument: str) -> Path:
    """Returns the local path to write to, from the value of `argument`. Refuses URLs."""
    if not isinstance(path, str | Path):
        raise TypeError(f"`{argument}` must be a string or a path. Received: {argument}={path!r}")
    if not str(path):
        raise ValueError(f"`{argument}` must not be empty: pass a path. Received: ''")
    if "://" in str(path) or str(path).startswith(("hf:/", "kaggle:/")):
        raise ValueError(
            f"`{argument}` must be a path on this machine. Save there, then upload the folder with "
            f"`keras_gemma.upload_preset(uri, folder)`. Received: {argument}={str(path)!r}"
        )
    return Path(path).expanduser()


def check_target(target: Path, kind: Kind, overwrite: bool, argument: str) -> None:
    """Checks that a save may write `target`: before the work, and for every kind alike.

    A new path and an empty folder may be written. With `overwrite`, so may a path of this `kind`.
    Anything else is never replaced. `argument` is the caller's name of `target`, for messages.
    """
    if kind.is_folder:
        _check_folder(target.resolve(), argument)
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    if not kind.matches(target):
        raise ValueError(
            f"`{argument}` exists, and `overwrite=True` replaces only {kind.title}: choose another "
            f"path. Received: {argument}={str(target)!r}"
        )
    if not overwrite:
        raise ValueError(
            f"`{argument}` exists: choose another path, or pass overwrite=True to replace it. "
            f"Received: {argument}={str(target)!r}"
        )


def check_writable(folder: Path, argument: str) -> None:
    """Raises a ValueError if `folder` cannot be written, or created. Creates nothing."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise _not_writable(argument, folder, error) from error


def _not_writable(argument: str, path: Path, error: OSError) -> ValueError:
    return ValueError(
        f"`{argument}` cannot be written: {error.strerror}. Pass a writable path. "
        f"Received: {argument}={str(path)!r}"
    )


def _check_folder(folder: Path, argument: str) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(
            f"`{argument}` must be a folder, but {folder} is a file. Pass another path."
        )
    if folder.exists() and Path.cwd().is_relative_to(folder):
        raise ValueError(
            f"`{argument}` is the current directory or contains it, so it cannot be replaced. "
            f"Received: {folder}. Save to a separate folder, such as "
            f"{str(folder / 'my_gemma')!r}."
        )


@contextlib.contextmanager
def scratch_folder(target: Path, argument: str) -> Iterator[Path]:
    """Creates a hidden folder next to `target`, an absolute path, and removes it at the end."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise _not_writable(argument, target, error) from error
    try:
        yield work
    except Exception as error:
        if not any(text in str(error) for text in FULL_DISK):
            raise
        raise OSError(
            errno.ENOSPC,
            f"No space is left on the disk of `{argument}`, and nothing was replaced. Free some "
            "space, or choose a path on another disk",
            str(target),
        ) from error
    finally:
        if target.exists() or not (work / OLD).exists():
            shutil.rmtree(work)


@contextlib.contextmanager
def replacing(
    folder: Path, stale: Callable[[str], bool], argument: str = "preset_dir"
) -> Iterator[Path]:
    """Yields a new folder to write into, which replaces `folder` when the block succeeds.

    The new folder is created next to `folder`. Earlier files are kept unless they are rewritten or
    `stale`, and replaced files pass on their permissions. If the block raises, `folder` is
    unchanged. If the process dies between the two renames, `folder` is missing and its content is
    complete in a hidden folder next to it:

        my_gemma             renamed to .my_gemma.k3x9/old, for a moment
        .my_gemma.k3x9/new   then renamed to my_gemma

    `stale` returns True if the file with this relative path (`"assets/x"`) is dropped.
    """
    folder = Path(folder).expanduser().resolve()
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
    """Links the files that `fresh` does not replace, or copies them if links are unsupported."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        target = fresh / name
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                target.mkdir(parents=True, exist_ok=True)
        elif not target.exists() and not stale(name.as_posix()):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, target, follow_symlinks=False)
            except OSError:
                shutil.copy2(path, target, follow_symlinks=False)
    for path in (folder, *folder.rglob("*")):
        target = fresh / path.relative_to(folder)
        if target.exists() and not path.is_symlink() and not target.is_symlink():
            shutil.copymode(path, target)
