"""Export of a model to a folder that runs without Keras and without this package.

folder.py             the export folder, replaced only when the new one is complete; its metadata
subprocess_export.py  export in this process, or in a subprocess on another backend
saved_model.py        TensorFlow's SavedModel
serving_options.py    default settings of a served model
graph/                functions of the SavedModel, as TensorFlow graphs
torch_program.py      program of torch.export: ids in, logits out
jax_program.py        program of jax.export
onnx_program.py       program for onnxruntime
forward.py            the function that these programs compute
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keras_gemma.checks import check_argument_names, check_one_of
from keras_gemma.export import jax_program, onnx_program, saved_model, torch_program
from keras_gemma.export.folder import new_folder

FORMATS: dict[str, Callable[..., None]] = {
    "tf_saved_model": saved_model.write,
    "torch": torch_program.write,
    "jax": jax_program.write,
    "onnx": onnx_program.write,
}
"""Export function `(lm, directory, *, options)` of each format.

Checks the options, then fills the empty folder `directory`.
"""


def export(
    lm: Any,
    path: str | Path,
    format: str = "tf_saved_model",
    overwrite: bool = False,
    **options: Any,
) -> None:
    """Implements `GemmaCausalLM.export`."""
    check_one_of("format", format, FORMATS)
    names = list(inspect.signature(FORMATS[format]).parameters)[2:]
    check_argument_names(f"export(format={format!r})", options, names)
    with new_folder(path, format, overwrite) as directory:
        FORMATS[format](lm, directory, **options)
