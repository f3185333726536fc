"""Published presets: names, configurations and locations of the weights.

Reads the folders under `presets/`, which are installed with the package. Knows no framework, no
Keras and no network; `storage/` fetches and loads what is listed here.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from keras_gemma import hub_caches
from keras_gemma.config import GemmaConfig


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
    keys = ("description", "license", "license_url", "kaggle_handle", "hugging_face_handle")
    values = config["config"] | {"context_length": metadata["context_length"]}
    family = config["class_name"].removesuffix("Backbone")
    return Preset(
        name=folder.name,
        folder=folder,
        config=GemmaConfig.from_keras_hub(family, values),
        dtype=config["config"]["dtype"]["config"]["name"],
        **{key: metadata[key] for key in keys},
    )
