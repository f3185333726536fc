"""`keras-gemma presets`: lists the presets with their sizes and licenses.

Reads the catalogue and the caches of the hubs. Needs neither Keras nor a network.
"""

import json
from typing import Any

from keras_gemma import catalogue
from keras_gemma.cli.options import JsonOption
from keras_gemma.cli.printing import PIPE_WIDTH, make_console, make_table

DTYPES = ("float32", "bfloat16", "int8", "int4")
OPTIONAL = ("license", "float32", "int8", "int4", "context", "parameters", "bfloat16", "weights")
"""Columns that a narrow terminal leaves out, in this order."""


def presets(as_json: JsonOption = False) -> None:
    """List the presets: size, memory of the weights, location and license."""
    entries = [describe(preset) for preset in catalogue.presets().values()]
    if as_json:
        print(*(json.dumps(entry, ensure_ascii=False) for entry in entries), sep="\n")
    else:
        print_table(entries)


def describe(preset: catalogue.Preset) -> dict[str, Any]:
    """Returns the entry of `preset`. Memory is in bytes, and counts only the weights."""
    return {
        "name": preset.name,
        "parameters": preset.config.parameter_count,
        "context_length": preset.config.context_length,
        "memory": {dtype: preset.config.weight_bytes(dtype) for dtype in DTYPES},
        "weights": _location(preset),
        "license": preset.license,
        "license_url": preset.license_url,
        "description": preset.description,
        "kaggle_handle": preset.kaggle_handle,
        "hugging_face_handle": preset.hugging_face_handle,
    }


def print_table(entries: list[dict[str, Any]]) -> None:
    """Prints a table of as many columns as fit."""
    console = make_console()
    unlimited = console.options.update(width=PIPE_WIDTH)
    rows = [_cells(entry) for entry in entries]
    columns = list(rows[0])

    def make() -> Any:
        titles = [(name, name not in ("preset", "weights", "license")) for name in columns]
        return make_table(titles, [[row[name] for name in columns] for row in rows])

    for name in OPTIONAL:
        if console.measure(make(), options=unlimited).maximum <= console.width:
            break
        columns.remove(name)
    console.print(make())


def _cells(entry: dict[str, Any]) -> dict[str, str]:
    """Returns a row of the table, by column."""
    memory = {dtype: _gigabytes(entry["memory"][dtype]) for dtype in DTYPES}
    return {
        "preset": entry["name"],
        "parameters": f"{entry['parameters'] / 1e6:,.1f} M",
        "context": f"{entry['context_length']:,}",
        **memory,
        "weights": entry["weights"],
        "license": entry["license"],
    }


def _location(preset: catalogue.Preset) -> str:
    if preset.has_weights:
        return "built in"
    if preset.package is not None:
        return "installed" if preset.package.find_parts() else "to install"
    return "cached" if preset.is_cached() else "to download"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10**9 / 2 else f"{count / 1e6:.1f} MB"
