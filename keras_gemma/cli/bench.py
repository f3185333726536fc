"""`keras-gemma bench`: speed and memory of a model, compared with what the machine can reach."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from typer import BadParameter, Option

from keras_gemma import catalogue, progress
from keras_gemma.cli.options import (
    DEFAULT_MODEL,
    BackendOption,
    DebugOption,
    DtypeOption,
    JsonOption,
    LoadedQuantization,
    ModelOption,
    full_name,
    start,
)
from keras_gemma.cli.printing import make_console, make_table
from keras_gemma.config import GemmaConfig
from keras_gemma.version import __version__

MAX_LAYERS = 300
"""Maximum number of layers. Keras's graph of about 500 exceeds Python's recursion limit."""


def bench(
    model: ModelOption = None,
    preset: str | None = Option(None, hidden=True, help="Earlier name of --model."),
    shape: str | None = Option(None, help="Use random weights in the sizes of this preset."),
    layers: int | None = Option(
        None, min=1, max=MAX_LAYERS, help="Number of layers of --shape.", show_default="all"
    ),
    dtype: DtypeOption = None,
    quantization: LoadedQuantization | None = Option(
        None, help="Precision of the matrices.", show_default="as stored"
    ),
    prompt: int = Option(32, min=1, help="Tokens per prompt."),
    new: int = Option(32, min=2, help="New tokens per prompt."),
    batch: int = Option(1, min=1, help="Number of prompts."),
    repeat: int = Option(3, min=1, help="Calls after the first one. The fastest counts."),
    backend: BackendOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure loading, prefill, decoding and memory, and the limits of the machine."""
    model = preset or model
    if model is not None and shape is not None:
        raise BadParameter("pass --model or --shape, not both", param_hint="--shape")
    if layers is not None and shape is None:
        raise BadParameter("needs --shape", param_hint="--layers")
    name = find_shape(shape) if shape else full_name(model or DEFAULT_MODEL)
    start(backend, debug=debug)

    # These imports load Keras on the chosen backend.
    with progress.status("Starting ..."):
        from keras_gemma.benchmark.generation import Work, check_context, check_memory, measure
        from keras_gemma.cli.loading import read_description

    work = Work(prompt, new, batch, repeat)
    listed = catalogue.presets().get(name)
    if shape:
        config = dataclasses.replace(listed.config, num_layers=layers or listed.config.num_layers)
    else:
        config = GemmaConfig.from_dict(read_description(name))
    dtype_name = dtype or (listed and listed.dtype)
    check_context(config, work)
    check_memory(config, work, dtype_name, quantization)
    make = model_maker(None if shape else name, config, dtype_name, quantization)
    about = {"keras_gemma": __version__, "model": name, "random_weights": bool(shape)}
    figures = about | measure(make, work)
    if as_json:
        print(json.dumps(figures))
    else:
        print_figures(figures)


def find_shape(name: str) -> str:
    """Returns the preset `name`, or `name` with `_en` appended."""
    listed = catalogue.presets()
    for candidate in (name, f"{name}_en"):
        if candidate in listed:
            return candidate
    raise BadParameter(f"unknown preset {name!r}. {catalogue.suggest(name)}", param_hint="--shape")


def model_maker(
    preset: str | None, config: GemmaConfig, dtype: str | None, quantization: str | None
) -> Callable[[], Any]:
    """Returns a function that loads `preset`, or makes random weights if `preset` is `None`."""
    from keras_gemma.benchmark.random_model import random_model
    from keras_gemma.causal_lm.model import GemmaCausalLM

    if preset is None:
        return lambda: random_model(config, dtype, quantization=quantization)
    arguments = {"dtype": dtype, "preprocessor": None, "quantization": quantization}
    return lambda: GemmaCausalLM.from_preset(preset, **arguments)


def print_figures(figures: dict[str, Any]) -> None:
    """Prints the result of `measure` as a table."""
    weights = figures["weights_gb"]
    product = f"{figures['best_product_dtype']} product"

    def memory(name: str) -> tuple[str, str]:
        peak = figures[name]
        if peak is None:
            return "unknown", "on this system"
        return f"{peak:.3g} GB", f"{peak / weights:.2f} x the weights"

    def share(name: str, of: str) -> str:
        return f"{figures[name]:.1%} {of}" if figures[name] is not None else "too short to measure"

    def speed(name: str) -> str:
        value = figures[name]
        return "unknown" if value is None else f"{value:,.{0 if value >= 100 else 1}f} tokens/s"

    rows = [
        ("memory bandwidth", f"{figures['bandwidth_gb_per_second']:.3g} GB/s", ""),
        (
            "best matrix product",
            f"{figures['best_product_gflop_per_second']:,.0f} GFLOP/s",
            product,
        ),
        ("load", f"{figures['load_seconds']:.3g} s", f"{weights:.3g} GB of weights"),
        ("first call", f"{figures['first_call_seconds']:.3g} s", "including compilation"),
        ("time to first token", f"{figures['time_to_first_token_seconds']:.3g} s", ""),
        (
            "prefill",
            speed("prefill_tokens_per_second"),
            share("prefill_fraction_of_best_product", "of the best product"),
        ),
        (
            "decoding",
            speed("decode_tokens_per_second"),
            share("mbu", "of the bandwidth (MBU)"),
        ),
        ("total", speed("tokens_per_second"), "new tokens over prefill and decoding"),
        ("peak memory, loading", *memory("peak_loading_gb")),
        ("peak memory, generating", *memory("peak_generating_gb")),
    ]
    if figures["peak_device_gb"] is not None:
        rows.append(("peak device memory", *memory("peak_device_gb")))
    print(
        f"{figures['model']}{', random weights' if figures['random_weights'] else ''}: "
        f"{figures['parameters'] / 1e6:,.0f} M parameters, {figures['layers']} layers, "
        f"{figures['dtype']}, {figures['quantization'] or 'not quantized'}, "
        f"on {figures['backend']}; prompt {figures['prompt']}, "
        f"new {figures['new']}, batch {figures['batch']}, best of {figures['repeat']}"
    )
    make_console().print(make_table([("", False), ("measured", True), ("", False)], rows))
