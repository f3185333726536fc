"""Published presets: names, configurations and locations of the weights.

Reads the folders under `presets/`, which are installed with the package. Knows no framework, no
Keras and no network; `storage/` fetches and loads what is listed here.
"""

import dataclasses
import difflib
import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

from keras_gemma import hub_caches
from keras_gemma.config import GemmaConfig


@dataclasses.dataclass(frozen=True)
class WeightsPackage:
    """Python packages with the parts of a preset's weights, which are one file."""

    distribution: str
    """Distribution that requires all of them."""
    extra: str
    """Extra of keras-gemma that installs them."""
    file: str
    """Name of the joined file."""
    sha256: str
    parts: tuple[str, ...]
    """Path of each part: its module and the path in the module's folder."""

    def find_parts(self) -> list[Path] | None:
        """Returns the installed parts in their order, or `None` if one is missing."""
        paths = []
        for part in self.parts:
            module, _, name = part.partition("/")
            spec = importlib.util.find_spec(module)
            folders = (spec and spec.submodule_search_locations) or []
            paths += [path for folder in folders if (path := Path(folder) / name).is_file()][:1]
        return paths if len(paths) == len(self.parts) else None


@dataclasses.dataclass(frozen=True)
class Preset:
    """Published preset, read from its folder."""

    name: str
    folder: Path
    config: GemmaConfig
    dtype: str
    """Default dtype of `from_preset`."""
    description: str
    license: str
    license_url: str
    kaggle_handle: str | None
    hugging_face_handle: str | None
    package: WeightsPackage | None = None
    """Packages that hold the weights, or `None` if a hub or this package does."""

    @property
    def has_weights(self) -> bool:
        """True if the weights are part of the package."""
        return hub_caches.holds_weights(hub_caches.folder_finder(self.folder))

    def is_cached(self) -> bool:
        """Returns True if the weights are in the local Kaggle or Hugging Face cache."""
        return any(hub_caches.holds_weights(find) for find in self.finders().values())

    def finders(self) -> dict[str, hub_caches.Find]:
        """Returns a function that finds cached files for each handle, Kaggle's first."""
        hubs = {
            self.kaggle_handle: hub_caches.kaggle_finder,
            self.hugging_face_handle: hub_caches.hugging_face_finder,
        }
        return {handle: hubs[handle](handle.partition("://")[2]) for handle in hubs if handle}

    def describe(self) -> dict[str, Any]:
        """Returns the entry of `GemmaCausalLM.presets`, in KerasHub's format."""
        return {
            "metadata": {
                "description": self.description,
                "params": self.config.parameter_count,
                "path": self.config.family.lower(),
                "context_length": self.config.context_length,
                "license": self.license,
                "license_url": self.license_url,
            },
            "kaggle_handle": self.kaggle_handle,
            "hugging_face_handle": self.hugging_face_handle,
        }


@functools.cache
def _read_all() -> tuple[Preset, ...]:
    listed = (_read(path.parent) for path in sorted(_root().glob("*/metadata.json")))
    return tuple(sorted(listed, key=lambda preset: preset.config.parameter_count))


def presets() -> dict[str, Preset]:
    """Returns all presets by name, smallest first."""
    return {preset.name: preset for preset in _read_all()}


def suggest(name: str) -> str:
    """Returns advice for a name that is not a preset: similar names, if there are any."""
    names = {preset_name: preset_name for preset_name in presets()}
    for preset in presets().values():
        names.setdefault(preset.name.removesuffix("_en"), preset.name)
        # Many know only the publisher's name.
        publishers_name = (preset.hugging_face_handle or "").rpartition("/")[2].lower()
        if publishers_name:
            names.setdefault(publishers_name, preset.name)
    matches = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.6)
    similar = ", ".join(repr(near) for near in dict.fromkeys(map(names.get, matches)))
    listed = "`keras-gemma presets` lists all names."
    return f"Similar names are {similar}; {listed}" if similar else listed


def find(preset: str | Path) -> Preset | None:
    """Returns the preset with this name or Kaggle handle (any version), or `None`."""
    for published in _read_all():
        handle = (published.kaggle_handle or "").rpartition("/")[0]
        if preset == published.name or (handle and f"{preset}/".startswith(f"{handle}/")):
            return published
    return None


def _root() -> Path:
    """Returns `presets/` in the installed package or at the top of a source checkout."""
    package = Path(__file__).parent
    roots = (package / "presets", package.parent / "presets")
    for root in roots:
        if root.is_dir():
            return root
    raise FileNotFoundError(
        f"The presets are not installed: looked for {roots[0]} and {roots[1]}. Install "
        "keras-gemma from its wheel or its repository again."
    )


def _read(folder: Path) -> Preset:
    config, metadata = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in ("config.json", "metadata.json")
    )
    package = metadata.get("package")
    keys = ("description", "license", "license_url", "kaggle_handle", "hugging_face_handle")
    values = config["config"] | {"context_length": metadata["context_length"]}
    family = config["class_name"].removesuffix("Backbone")
    return Preset(
        name=folder.name,
        folder=folder,
        config=GemmaConfig.from_keras_hub(family, values),
        dtype=config["config"]["dtype"]["config"]["name"],
        package=package and WeightsPackage(**package | {"parts": tuple(package["parts"])}),
        **{key: metadata[key] for key in keys},
    )
