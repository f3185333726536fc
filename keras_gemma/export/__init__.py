"""A model as a folder that others run, without Keras and without this package.

exportable.py       what a model has of it: `export`
folder.py           the folder: in its place when it is whole
subprocess_export.py where it is made: here, or by a process on another backend
saved_model.py      TensorFlow's SavedModel
serving_options.py  what it does where a call says nothing
graph/              what is in it, alone to import TensorFlow
torch_program.py    a program of torch.export: ids in, logits out
jax_program.py      the same of jax.export
onnx_program.py     the same for onnxruntime
forward.py          what these programs compute
torch_tracing.py    the trace that two of them are made of
program_folder.py   what stands beside them
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keras_gemma.export import jax_program, onnx_program, saved_model, torch_program
from keras_gemma.export.folder import new_folder

FORMATS: dict[str, Callable[..., None]] = {
    "tf_saved_model": saved_model.write,
    "torch": torch_program.write,
    "jax": jax_program.write,
    "onnx": onnx_program.write,
}
"""`(lm, directory, *, options)` of each format: checks the options, then fills an empty folder."""


def export(
    lm: Any,
    path: str | Path,
    format: str = "tf_saved_model",
    overwrite: bool = False,
    **options: Any,
) -> None:
    """See `GemmaCausalLM.export`."""
    if format not in list(FORMATS):
        raise ValueError(
            f"`format` must be one of {', '.join(map(repr, FORMATS))}. Received: format={format!r}"
        )
    known = list(inspect.signature(FORMATS[format]).parameters)[2:]
    unknown = [name for name in options if name not in known]
    if unknown:
        options = ", ".join(known) or "none"
        raise TypeError(f"format={format!r} has no option `{unknown[0]}`. There are: {options}.")
    with new_folder(path, format, overwrite) as directory:
        FORMATS[format](lm, directory, **options)
