"""`keras-gemma presets`: the models that have a name, and what they take.

Reads the catalogue and the caches of the hubs; needs neither Keras nor a network.
"""

import json
import sys
from typing import Annotated, Any

import typer

from keras_gemma import catalogue

DTYPES = ("float32", "bfloat16", "int8", "int4")
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
    """What the command tells of `preset`; memory is in bytes, and that of the weights alone."""
    return {
        "name": preset.name,
        "parameters": preset.config.parameter_count,
        "context_length": preset.context_length,
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
    table = Table(box=SIMPLE_HEAD if terminal else None, pad_edge=False, header_style="bold")
    table.add_column("preset", overflow="fold", style="cyan")
    for name in ("parameters", "context", *DTYPES):
        table.add_column(name, justify="right", overflow="fold")
    for name in ("weights", "license"):
        table.add_column(name, overflow="fold")
    for entry in described:
        table.add_row(
            entry["name"],
            f"{entry['parameters'] / 1e6:,.1f} M",
            f"{entry['context_length']:,}",
            *(_gigabytes(entry["memory"][dtype]) for dtype in DTYPES),
            entry["weights"],
            entry["license"],
        )
    if terminal:
        console = Console()
    else:
        console = Console(force_terminal=False, color_system=None, width=PIPE_WIDTH)
    console.print(table)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10**9 / 2 else f"{count / 1e6:.1f} MB"
