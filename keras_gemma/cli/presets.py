"""`keras-gemma presets`: the models that have a name, and what they take.

Reads the catalogue and the caches of the hubs; needs neither Keras nor a network.
"""

import json
import sys
from typing import Annotated, Any

import typer

from keras_gemma import catalogue

DTYPES = ("float32", "bfloat16", "int8", "int4")
DROPPED = ("license", "float32", "int8", "int4", "context", "parameters", "bfloat16", "weights")
"""The columns that a narrow terminal does without, one after the other."""
PIPE_WIDTH = 400
"""Characters a line may have where no terminal sets a limit."""


def presets(
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON a preset.")] = False,
) -> None:
    """List the models that have a name: size, memory of the weights, and where they are."""
    described = [describe(preset) for preset in catalogue.presets().values()]
    if as_json:
        for entry in described:
            print(json.dumps(entry, ensure_ascii=False))
        return
    print_table(described)


def describe(preset: catalogue.Preset) -> dict[str, Any]:
    """What the command tells of `preset`; memory is in bytes, that of the weights alone."""
    return {
        "name": preset.name,
        "parameters": preset.config.parameter_count,
        "context_length": preset.config.context_length,
        "memory": {dtype: preset.config.weight_bytes(dtype) for dtype in DTYPES},
        "weights": whereabouts(preset),
        "license": preset.license,
        "license_url": preset.license_url,
        "description": preset.description,
        "kaggle_handle": preset.kaggle_handle,
        "hugging_face_handle": preset.hugging_face_handle,
    }


def whereabouts(preset: catalogue.Preset) -> str:
    """`"built in"`, `"cached"` on this machine, or `"to download"`."""
    if preset.has_weights:
        return "built in"
    return "cached" if preset.is_cached() else "to download"


def print_table(described: list[dict[str, Any]]) -> None:
    """A table on standard output: in colour on a terminal, plain and whole in a pipe."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    terminal = sys.stdout.isatty()
    if terminal:
        console = Console()
    else:
        console = Console(force_terminal=False, color_system=None, width=PIPE_WIDTH)
    unlimited = console.options.update(width=PIPE_WIDTH)
    rows = [_cells(entry) for entry in described]

    def make(columns: list[str]) -> Table:
        table = Table(box=SIMPLE_HEAD if terminal else None, pad_edge=False, header_style="bold")
        for name in columns:
            justify = "left" if name in ("preset", "weights", "license") else "right"
            style = "cyan" if name == "preset" else None
            table.add_column(name, justify=justify, style=style, no_wrap=True)
        for row in rows:
            table.add_row(*(row[name] for name in columns))
        return table

    columns = list(rows[0])
    for name in DROPPED:
        if console.measure(make(columns), options=unlimited).maximum <= console.width:
            break
        columns.remove(name)
    console.print(make(columns))


def _cells(entry: dict[str, Any]) -> dict[str, str]:
    """A row of the table: the columns and what they say."""
    memory = {dtype: _gigabytes(entry["memory"][dtype]) for dtype in DTYPES}
    return {
        "preset": entry["name"],
        "parameters": f"{entry['parameters'] / 1e6:,.1f} M",
        "context": f"{entry['context_length']:,}",
        **memory,
        "weights": entry["weights"],
        "license": entry["license"],
    }


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10**9 / 2 else f"{count / 1e6:.1f} MB"
