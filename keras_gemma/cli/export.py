"""`keras-gemma export`: a model as a folder that others run, without Keras and without this."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from keras_gemma.cli.convert import SourceArgument, written
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
    """What a model can be exported as."""

    TF_SAVED_MODEL = "tf_saved_model"
    TORCH = "torch"
    JAX = "jax"
    ONNX = "onnx"


MAKERS = {
    Format.TF_SAVED_MODEL: Backend.tensorflow,
    Format.TORCH: Backend.torch,
    Format.JAX: Backend.jax,
    Format.ONNX: Backend.torch,
}
"""The backend that needs no second process for a format."""


def export(
    source: SourceArgument,
    target: Annotated[Path, typer.Argument(help="The folder to write.")],
    format: Annotated[
        Format, typer.Option(help="The first takes and gives strings, the others ids and logits.")
    ] = Format.TF_SAVED_MODEL,
    quantization: Annotated[
        Quantization | None, typer.Option(help="Bits of the matrices; not for onnx.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Of tf_saved_model: where a call does not say; by default 256."),
    ] = None,
    max_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Of tf_saved_model: the most texts at a time.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=0, help="Of jax: rows of every call, by default 1; 0: any.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the export that is there.")
    ] = False,
    dtype: DtypeOption = None,
    backend: BackendOption = None,
    debug: DebugOption = False,
) -> None:
    """Write SOURCE to TARGET as a TensorFlow SavedModel, or a program for another runtime."""
    if quantization is not None and format is Format.ONNX:
        raise typer.BadParameter(
            "onnx takes a model in floating point", param_hint="--quantization"
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
                f"{format.value} has no such option", param_hint=f"--{name.replace('_', '-')}"
            )
    if "batch_size" in options:
        options["batch_size"] = batch_size or None
    if backend is None and not os.environ.get("KERAS_BACKEND"):
        backend = MAKERS[format]
    start(backend, debug=debug)

    # Imports Keras, on the chosen backend.
    from keras_gemma.causal_lm.model import GemmaCausalLM
    from keras_gemma.export import FORMATS
    from keras_gemma.export.folder import new_folder

    with new_folder(target, format.value, overwrite) as directory:  # before a model is read
        lm = GemmaCausalLM.from_preset(
            full_name(source),
            dtype=dtype and dtype.value,
            quantization=quantization and quantization.value,
        )
        FORMATS[format.value](lm, directory, **options)
    print(f"{source} is in {target} now, as {format.value}: {written(target)}")
