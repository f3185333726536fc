"""`keras-gemma bench`: how fast this machine runs a model, beside what it could do."""

import dataclasses
import difflib
import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from keras_gemma import catalogue
from keras_gemma.cli.options import BackendOption, DebugOption, Dtype, Quantization, start
from keras_gemma.config import GemmaConfig
from keras_gemma.version import __version__

DEFAULT = "gemma_tiny_en"
PIPE_WIDTH = 160


def bench(
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            "--model",
            help=f"Preset name, handle, or directory.  [default: {DEFAULT}]",
        ),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Random weights in the sizes of a preset's name.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Of --shape: so many layers instead of all.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="By default the preset's own.")] = None,
    quantization: Annotated[
        Quantization | None,
        typer.Option(help="Bits of the matrices; by default as the model is stored."),
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 32,
    new: Annotated[int, typer.Option(min=2, help="Tokens that follow.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 1,
    repeat: Annotated[
        int, typer.Option(min=1, help="Calls after the first; the fastest counts.")
    ] = 3,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Time rows x matrix instead, in each form.")
    ] = False,
    backend: BackendOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """Measure load, prompt, decoding and memory, and what the machine itself reaches."""
    check_choice(preset, shape, layers)
    name = find_shape(shape) if shape else preset or DEFAULT
    start(backend, debug=debug)

    # Keras is imported here, on the backend chosen.
    from keras_gemma.benchmark.generation import Work, check_context, check_memory, measure

    work = Work(prompt, new, batch, repeat)
    listed = catalogue.presets().get(name)
    if shape:
        config = dataclasses.replace(listed.config, num_layers=layers or listed.config.num_layers)
    else:
        config = read_config(name)
    chosen = dtype.value if dtype else listed and listed.dtype
    head = {"keras_gemma": __version__, "model": name, "random_weights": bool(shape)}
    if kernels:
        figures = {**head, **measure_all_kernels(config, chosen or Dtype.BFLOAT16.value)}
        print_result = print_kernels
    else:
        check_context(config, work)
        bits = quantization and quantization.value
        check_memory(config, work, chosen, bits)
        make = make_model(None if shape else name, config, chosen, bits)
        figures = {**head, **measure(make, work)}
        print_result = print_figures
    if as_json:
        print(json.dumps(figures))
    else:
        print_result(figures)


def check_choice(preset: str | None, shape: str | None, layers: int | None) -> None:
    """Raise a typer.BadParameter where the options contradict each other."""
    if preset is not None and shape is not None:
        raise typer.BadParameter("give --preset or --shape, not both", param_hint="--shape")
    if layers is not None and shape is None:
        raise typer.BadParameter(
            "a preset has the layers it has; give --shape with it", param_hint="--layers"
        )


def find_shape(name: str) -> str:
    """The published preset that is called so, or so and `_en`.

    Raises:
        typer.BadParameter: there is none; the nearest names are given.
    """
    listed = catalogue.presets()
    for candidate in (name, f"{name}_en"):
        if candidate in listed:
            return candidate
    near = difflib.get_close_matches(name, listed, n=3, cutoff=0.5) or list(listed)[:3]
    raise typer.BadParameter(
        f"no preset is called {name!r}. The nearest names are {', '.join(near)}",
        param_hint="--shape",
    )


def read_config(preset: str) -> GemmaConfig:
    """The sizes of a preset, before its weights are fetched or read."""
    from keras_gemma.storage.formats import format_of
    from keras_gemma.storage.hub.locate import resolve

    folder = resolve(preset, text=False, weights=False)
    return GemmaConfig.from_dict(format_of(folder).read_backbone(folder))


def make_model(
    preset: str | None, config: GemmaConfig, dtype: str | None, quantization: str | None
) -> Callable[[], Any]:
    """What loads `preset`, or makes random weights where it is None."""
    from keras_gemma.benchmark.random_model import random_model
    from keras_gemma.causal_lm.model import GemmaCausalLM

    if preset is None:
        return lambda: random_model(config, dtype, quantization=quantization)
    arguments = {"dtype": dtype, "preprocessor": None, "quantization": quantization}
    return lambda: GemmaCausalLM.from_preset(preset, **arguments)


def measure_all_kernels(config: GemmaConfig, dtype: str) -> dict[str, Any]:
    """The machine's bandwidth, and every entry of `measure_kernels`."""
    import keras

    from keras_gemma import progress
    from keras_gemma.backend import memory_bandwidth
    from keras_gemma.benchmark.kernels import count_kernels, measure_kernels

    bandwidth = memory_bandwidth()
    entries = []
    with progress.bar("Measuring", count_kernels(config)) as advance:
        for entry in measure_kernels(config, dtype):
            entries.append(entry)
            advance(1)
    bandwidth = max(bandwidth, memory_bandwidth())
    return {
        "backend": keras.config.backend(),
        "dtype": dtype,
        "bandwidth_gb_per_second": float(f"{bandwidth / 1e9:.4g}"),
        "kernels": entries,
    }


def print_figures(figures: dict[str, Any]) -> None:
    """A table for people of what `measure` found."""
    weights = figures["weights_gb"]
    product = f"{figures['best_product_dtype']} product"

    def memory(name: str) -> tuple[str, str]:
        peak = figures[name]
        if peak is None:
            return "not known", "on this system"
        return f"{peak:.3g} GB", f"{peak / weights:.2f} x the weights"

    def share(name: str, of: str) -> str:
        return f"{figures[name]:.1%} {of}" if figures[name] is not None else "too short to tell"

    def speed(name: str) -> str:
        value = figures[name]
        return "not known" if value is None else f"{value:,.{0 if value >= 100 else 1}f} tokens/s"

    rows = [
        ("memory bandwidth", f"{figures['bandwidth_gb_per_second']:.3g} GB/s", ""),
        (
            "best matrix product",
            f"{figures['best_product_gflop_per_second']:,.0f} GFLOP/s",
            product,
        ),
        ("load", f"{figures['load_seconds']:.3g} s", f"{weights:.3g} GB of weights"),
        ("first call", f"{figures['first_call_seconds']:.3g} s", "compiling included"),
        ("time to first token", f"{figures['time_to_first_token_seconds']:.3g} s", ""),
        (
            "prompt",
            speed("prefill_tokens_per_second"),
            share("prefill_fraction_of_best_product", "of the best product"),
        ),
        (
            "decoding",
            speed("decode_tokens_per_second"),
            share("mbu", "of the bandwidth (MBU)"),
        ),
        ("both", speed("tokens_per_second"), "prompt time included"),
        ("peak memory, loading", *memory("peak_loading_gb")),
        ("peak memory, generating", *memory("peak_generating_gb")),
    ]
    if figures["peak_device_gb"] is not None:
        rows.append(("peak on the accelerator", *memory("peak_device_gb")))
    title = (
        f"{figures['model']}{', random weights' if figures['random_weights'] else ''}: "
        f"{figures['parameters'] / 1e6:,.0f} M parameters, {figures['layers']} layers, "
        f"{figures['dtype']}, {figures['quantization'] or 'not quantized'}, "
        f"on {figures['backend']}; prompt {figures['prompt']}, "
        f"new {figures['new']}, batch {figures['batch']}, best of {figures['repeat']}"
    )
    print_table(title, ("", "measured", ""), rows)


def print_kernels(figures: dict[str, Any]) -> None:
    """A table for people: a line a matrix and form, a column a number of rows."""
    lines: dict[tuple[str, str, str], dict[int, float]] = {}
    for entry in figures["kernels"]:
        key = entry["matrix"], " x ".join(map(str, entry["shape"])), entry["form"]
        lines.setdefault(key, {})[entry["rows"]] = entry["gb_per_second"]
    counts = sorted({entry["rows"] for entry in figures["kernels"]})
    title = (
        f"GB/s of weights read, {figures['dtype']}, on {figures['backend']}; "
        f"memory bandwidth {figures['bandwidth_gb_per_second']:.3g} GB/s"
    )
    columns = ("matrix", "out x in", "form", *(f"{n} row{'s' * (n > 1)}" for n in counts))
    rows = [(*key, *(f"{speeds[n]:.3g}" for n in counts)) for key, speeds in lines.items()]
    print_table(title, columns, rows)


def print_table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A table on standard output: in colour on a terminal, plain and whole in a pipe."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    terminal = sys.stdout.isatty()
    width = None if terminal else PIPE_WIDTH
    console = Console(width=width, color_system="auto" if terminal else None)
    table = Table(box=SIMPLE_HEAD if terminal else None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        numeric = column == "measured" or column.endswith(("row", "rows"))
        table.add_column(
            column, justify="right" if numeric else "left", style="cyan" if i == 0 else None
        )
    for row in rows:
        table.add_row(*row)
    print(title)
    console.print(table)
