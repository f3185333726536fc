"""`keras-gemma export`: write a model as a folder that runs without Keras and this package."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from keras_gemma.cli.convert import SourceArgument, size_on_disk
from keras_gemma.cli.options import (
    Backend,
    BackendOption,
    DebugOption,
    DtypeOption,
    Quantization,
    full_name,
    start,
)


class Format(StrEnum):
    """Format of an export."""

    TF_SAVED_MODEL = "tf_saved_model"
    TORCH = "torch"
    JAX = "jax"
    ONNX = "onnx"


PREFERRED_BACKENDS = {
    Format.TF_SAVED_MODEL: Backend.tensorflow,
    Format.TORCH: Backend.torch,
    Format.JAX: Backend.jax,
    Format.ONNX: Backend.torch,
}
"""Backend that exports a format without a subprocess."""


def export(
    source: SourceArgument,
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    format: Annotated[
        Format,
        typer.Option(help="tf_saved_model maps text to text, the others ids to logits."),
    ] = Format.TF_SAVED_MODEL,
    quantization: Annotated[
        Quantization | None, typer.Option(help="Precision of the matrices; not for onnx.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="tf_saved_model: default for its calls.", show_default="256"),
    ] = None,
    max_batch_size: Annotated[
        int | None, typer.Option(min=1, help="tf_saved_model: maximum number of texts per call.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=0, help="jax: batch size of all calls; 0 means any.", show_default="1"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export.")
    ] = False,
    dtype: DtypeOption = None,
    backend: BackendOption = None,
    debug: DebugOption = False,
) -> None:
    """Write SOURCE to TARGET as a TensorFlow SavedModel, or a program for another runtime."""
    if quantization is not None and format is Format.ONNX:
        raise typer.BadParameter(
            "onnx needs a model in floating point", param_hint="--quantization"
        )
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "max_batch_size": max_batch_size,
        "batch_size": batch_size,
    }
    options = {name: value for name, value in options.items() if value is not None}
    for name in options:
        if (format is Format.JAX) != (name == "batch_size") or format in (
            Format.TORCH,
            Format.ONNX,
        ):
            raise typer.BadParameter(
                f"{format.value} does not have this option",
                param_hint=f"--{name.replace('_', '-')}",
            )
    if "batch_size" in options:
        options["batch_size"] = batch_size or None
    if backend is None and not os.environ.get("KERAS_BACKEND"):
        backend = PREFERRED_BACKENDS[format]
    start(backend, debug=debug)

    # These imports load Keras on the chosen backend.
    from keras_gemma.causal_lm.model import GemmaCausalLM
    from keras_gemma.export import FORMATS
    from keras_gemma.export.folder import new_folder

    with new_folder(target, format.value, overwrite) as directory:  # before the model is read
        lm = GemmaCausalLM.from_preset(
            full_name(source),
            dtype=dtype and dtype.value,
            quantization=quantization and quantization.value,
        )
        FORMATS[format.value](lm, directory, **options)
    print(f"Wrote {source} to {target} as {format.value}: {size_on_disk(target)}")
