"""`keras-gemma export`: write a model as a folder that runs without Keras and this package."""

import os
from pathlib import Path
from typing import Literal

from typer import Argument, BadParameter, Option

from keras_gemma import progress
from keras_gemma.backend_choice import Backend
from keras_gemma.cli.convert import SourceArgument, check_target, size_on_disk
from keras_gemma.cli.options import (
    BackendOption,
    DebugOption,
    DtypeOption,
    LoadedQuantization,
    OverwriteOption,
    drop_none,
    full_name,
    start,
)
from keras_gemma.extras import check_export

Format = Literal["tf_saved_model", "torch", "jax", "onnx"]
"""Format of an export."""

PREFERRED_BACKENDS: dict[Format, Backend] = {
    "tf_saved_model": "tensorflow",
    "torch": "torch",
    "jax": "jax",
    "onnx": "torch",
}
"""Backend that exports a format without a subprocess."""

OPTIONS = {"tf_saved_model": ("max_new_tokens", "max_batch_size"), "jax": ("batch_size",)}
"""Options that only some formats have."""


def export(
    source: SourceArgument,
    target: Path = Argument(help="Folder to write."),
    format: Format = Option(
        "tf_saved_model", help="tf_saved_model maps text to text, the others ids to logits."
    ),
    quantization: LoadedQuantization | None = Option(
        None, help="Precision of the matrices; not for onnx."
    ),
    max_new_tokens: int | None = Option(
        None, min=1, help="tf_saved_model: default for its calls.", show_default="256"
    ),
    max_batch_size: int | None = Option(
        None, min=1, help="tf_saved_model: maximum number of texts per call."
    ),
    batch_size: int | None = Option(
        None, min=0, help="jax: batch size of all calls; 0 means any.", show_default="1"
    ),
    overwrite: OverwriteOption = False,
    dtype: DtypeOption = None,
    backend: BackendOption = None,
    debug: DebugOption = False,
) -> None:
    """Write SOURCE to TARGET as a TensorFlow SavedModel, or a program for another runtime."""
    if quantization is not None and format == "onnx":
        raise BadParameter("onnx needs a model in floating point", param_hint="--quantization")
    options = drop_none(
        max_new_tokens=max_new_tokens, max_batch_size=max_batch_size, batch_size=batch_size
    )
    for name in options:
        if name not in OPTIONS.get(format, ()):
            hint = f"--{name.replace('_', '-')}"
            raise BadParameter(f"{format} does not have this option", param_hint=hint)
    if "batch_size" in options:
        options["batch_size"] = batch_size or None
    if backend is None and not os.environ.get("KERAS_BACKEND"):
        backend = PREFERRED_BACKENDS[format]
    check_export(format)
    start(backend, debug=debug)

    # These imports load Keras on the chosen backend.
    from keras_gemma.causal_lm.model import GemmaCausalLM
    from keras_gemma.export import FORMATS
    from keras_gemma.export.folder import EXPORTS, new_folder

    check_target(target, EXPORTS, overwrite)
    # The target is checked before the model is read.
    with new_folder(target, format, overwrite) as directory, progress.status("Exporting ..."):
        lm = GemmaCausalLM.from_preset(full_name(source), dtype=dtype, quantization=quantization)
        FORMATS[format](lm, directory, **options)
    print(f"Wrote {source} to {target} as {format}: {size_on_disk(target)}")
